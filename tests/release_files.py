"""Checkpoints of random weights, in the form in which the authors of LGM and ELIT save theirs.

    python tests/release_files.py FOLDER

What is imitated, read from the releases' training scripts; no code of theirs is used:

- LGM's tokenizer trainer reads its YAML with ruamel's round-trip loader, sets the values as
  defaults of argparse, and saves {model, optimizer, discriminator, optimizer_disc, steps, args,
  ema}. So numbers with a decimal point in `args`, and lr, betas and weight_decay in the optimizers,
  are `ruamel.yaml.scalarfloat.ScalarFloat`, a float with notes on how it was written.
  `yaml_numbers` makes classes of those names, whether or not ruamel is installed.
- LGM's generator trainer saves {model, model_ema, optimizer, loss_scaler, epoch,
  last_elapsed_time}. Its LoRA trainer saves the same of peft's wrapper, without an average
  (model_ema is None): names begin with `base_model.model.`, adapted layers have `base_layer.`,
  `lora_A.256.` and `lora_B.256.`, whatever K was.
- ELIT's trainer saves {model, ema, opt, args, steps}. Its average takes in every parameter, the
  frozen position table, too: `averaged` does to a table what 20,000 of its updates do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lgm_scale.families.elit.network import ELIT, SiT
from lgm_scale.families.lgm.lora import TARGETS, Adapter
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import Tokenizer, build_tokenizer
from lgm_scale.merging.tree import MergeTree

SMALL_TOKENIZER = TokenizerModelConfig(
    size="tiny", image_size=32, patch_size=8, num_base_tokens=16, latent_dim=8, codebook_size=32
)


def small_tokenizer() -> Tokenizer:
    """A tokenizer of `SMALL_TOKENIZER` with random weights everywhere."""
    torch.manual_seed(0)
    net = build_tokenizer(SMALL_TOKENIZER)
    shuffle(net, 1)
    return net.eval()


# --- names: written anew, not read from the importers ---------------------------------------------


def tokenizer_name(ours: str) -> str:
    """The release's name of a weight of the tokenizer."""
    for end in ("weight", "bias"):
        if ours == f"decoder.out.{end}":
            return f"decoder.to_pixel.model.{end}"
        if ours == f"decoder.latent_in.{end}":
            return f"post_quant_conv.{end}"
        if ours == f"to_latent.{end}":
            return f"quant_conv.{end}"
    fixed = {"quantizer.codes": "quantize.embedding", "merging.embeddings": None}
    if ours in fixed:
        return fixed[ours] or "merge_module.embeddings"
    return ours.replace("coder.vit.", "coder.model.")


def generator_name(ours: str) -> str:
    """The release's name of a weight of the diffusion transformer."""
    parts = ours.split(".")
    first = {
        "x_embed": "x_embedder",
        "t_embed": "t_embedder",
        "label_embed": "y_embedder",
        "final": "final_layer",
        "blocks": "transformer.blocks",
    }
    rest = {"table": "embedding_table", "modulation": "adaLN_modulation"}
    return ".".join([first.get(parts[0], parts[0]), *(rest.get(p, p) for p in parts[1:])])


def lora_name(ours: str) -> str:
    """The name of a weight of the base or of an adapter in a LoRA checkpoint."""
    name = f"base_model.model.{generator_name(ours)}"
    if ".lora_" in name:
        return name.replace(".weight", ".256.weight")
    layer, _, end = name.rpartition(".")
    return f"{layer}.base_layer.{end}" if layer.endswith(TARGETS) else name


_READ, _WRITE = "input_token_editor.adapters.0", "output_token_editor.adapters.0"
_OUTER = {
    "x_embedder.proj": "x_embed",
    "t_embedder.mlp.0": "t_embed.mlp.0",
    "t_embedder.mlp.2": "t_embed.mlp.2",
    "final_layer.linear": "final.linear",
    "final_layer.adaLN_modulation.1": "final.modulation.1",
}
_BLOCK = {
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "adaLN_modulation.1": "modulation.1",
}
_CROSS = {
    "q_proj.weight": "q.weight",
    "q_proj.bias": "q.bias",
    "kv_proj.weight": "kv.weight",
    "kv_proj.bias": "kv.bias",
    "q_norm.scale": "q_norm.weight",
    "k_norm.scale": "k_norm.weight",
    "proj.weight": "proj.weight",
    "proj.bias": "proj.bias",
}
_INTERFACE = {
    f"{_READ}.learned_query_embed": "read.queries",
    f"{_READ}.pos_embed": "read.offset",
    f"{_READ}.latent_pos_embed": "read.positions",
    f"{_READ}.fit_layer.read_ff.0.fc1.weight": "read.mlp.fc1.weight",
    f"{_READ}.fit_layer.read_ff.0.fc2.weight": "read.mlp.fc2.weight",
    f"{_READ}.fit_layer.adaLN_modulation.1.weight": "read.modulation.1.weight",
    f"{_READ}.fit_layer.adaLN_modulation.1.bias": "read.modulation.1.bias",
    f"{_WRITE}.pos_embed": "write.offset",
    f"{_WRITE}.write_ff.0.fc1.weight": "write.mlp.fc1.weight",
    f"{_WRITE}.write_ff.0.fc2.weight": "write.mlp.fc2.weight",
} | {
    f"{theirs}.{a}": f"{ours}.{b}"
    for theirs, ours in (
        (f"{_READ}.fit_layer.latents_attend_to_patches.0", "read.attn"),
        (f"{_WRITE}.patches_attend_to_latents.0", "write.attn"),
    )
    for a, b in _CROSS.items()
}


def elit_names(depth: int, interface: bool) -> dict[str, str]:
    """The release's name of every weight of an ELIT, or of a SiT -> ours."""
    blocks = {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(depth) for a, b in _BLOCK.items()}
    linear = {
        f"{a}.{kind}": f"{b}.{kind}"
        for a, b in (_OUTER | blocks).items()
        for kind in ("weight", "bias")
    }
    table = {"y_embedder.embedding_table.weight": "label_embed.table.weight"}
    return linear | table | (_INTERFACE if interface else {})


# --- numbers as YAML's loader makes them ----------------------------------------------------------


@contextmanager
def modules(**attributes: dict[str, Any]) -> Iterator[None]:
    """Let modules of these names (dots as double underscores) be found, for pickling by name."""
    made = {}
    for name, held in attributes.items():
        module = made[name.replace("__", ".")] = ModuleType(name.replace("__", "."))
        for key, value in held.items():
            value.__module__, value.__qualname__ = module.__name__, key
            setattr(module, key, value)
    with patch.dict(sys.modules, made):
        yield


@contextmanager
def yaml_numbers() -> Iterator[SimpleNamespace]:
    """Classes that pickle as ruamel.yaml's do; pickle inside of this context."""

    class Anchor:
        __slots__ = ("always_dump", "value")

    class ScalarFloat(float):
        def __new__(cls, value: float, text: str = "0.07") -> Any:
            number = float.__new__(cls, value)
            mantissa, exp, power = text.partition("e")
            number.__dict__ |= {
                "_width": len(mantissa),
                "_prec": mantissa.find("."),
                "_m_sign": False,
                "_m_lead0": 0,
                "_exp": exp or None,
                "_e_width": len(power) if exp else None,
                "_e_sign": power.startswith("-") if exp else None,
                "_underscore": None,
            }
            return number

    class ScalarInt(int):
        def __new__(cls, value: int) -> Any:
            number = int.__new__(cls, value)
            number.__dict__ |= {"_width": None, "_underscore": [3, False, False]}
            return number

    class ScalarBoolean(int):
        def __new__(cls, value: bool) -> Any:  # as the original
            number = int.__new__(cls, value)
            anchor = Anchor()
            anchor.value, anchor.always_dump = "flag", True
            number.__dict__ |= {"_yaml_anchor": anchor}
            return number

    with modules(
        ruamel__yaml__scalarfloat={"ScalarFloat": ScalarFloat},
        ruamel__yaml__scalarint={"ScalarInt": ScalarInt},
        ruamel__yaml__scalarbool={"ScalarBoolean": ScalarBoolean},
        ruamel__yaml__anchor={"Anchor": Anchor},
    ):
        yield SimpleNamespace(
            ScalarFloat=ScalarFloat, ScalarInt=ScalarInt, ScalarBoolean=ScalarBoolean
        )


# --- checkpoints ---------------------------------------------------------------------------------


def shuffle(net: nn.Module, seed: int) -> None:
    """Add noise to every weight, where a fresh network has zeros and ones, too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def tokenizer_content(net: Tokenizer, args: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's checkpoint with these `args`, and with the parts that an import leaves out."""
    state = {tokenizer_name(name): value for name, value in net.state_dict().items()}
    state |= {
        "repa_model.blocks.0.attn.qkv.weight": torch.ones(6, 2),
        "decoder_dino.mask_token": torch.ones(1, 1, 4),
        "post_quant_conv_dino.weight": torch.ones(4, 8),
        "to_pixel_dino.bias": torch.ones(5),
        "decoder.model.patch_embed.proj.weight": torch.ones(96, 3, 8, 8),
        "quantize.codebook_used": torch.zeros(4, 65536),
    }
    model = {name: torch.zeros_like(value) for name, value in state.items()}
    return {"model": model, "ema": state, "args": argparse.Namespace(**args), "steps": 7}


def save_tokenizer(net: Tokenizer, args: dict[str, Any], path: Path) -> None:
    """The file as the release's trainer writes it: YAML's numbers in `args` and optimizers."""
    with yaml_numbers() as yaml:
        numbers = {"tau": yaml.ScalarFloat(0.07), "lr": yaml.ScalarFloat(1e-4, "1.0e-4")}
        numbers |= {"beta1": yaml.ScalarFloat(0.9), "beta2": yaml.ScalarFloat(0.95)}
        numbers |= {"weight_decay": yaml.ScalarFloat(1e-4), "ckpt_every": yaml.ScalarInt(10_000)}
        numbers |= {"ema": yaml.ScalarBoolean(True)}
        betas = numbers["beta1"], numbers["beta2"]
        weight = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.AdamW(
            [weight], numbers["lr"], betas, weight_decay=numbers["weight_decay"]
        )
        weight.sum().backward()
        optimizer.step()
        rest = {
            "optimizer": optimizer.state_dict(),
            "discriminator": {"heads.0.weight": torch.ones(2)},
            "optimizer_disc": optimizer.state_dict(),
        }
        torch.save(tokenizer_content(net, args | numbers) | rest, path)


def generator_content(net: MergeDiT) -> dict[str, Any]:
    """A generator's checkpoint: the average is the network, the rest something else."""
    state = {generator_name(name): value for name, value in net.state_dict().items()}
    model = {name: value + 1 for name, value in state.items()}
    scaler = {"scale": 65536.0, "growth_tracker": 0}
    return {"model": model, "model_ema": state, "loss_scaler": scaler, "epoch": 399}


def lora_content(net: MergeDiT, adapter: Adapter) -> dict[str, Any]:
    """A LoRA's checkpoint: base and adapter under `model`, no average."""
    state = net.state_dict() | adapter.weights
    model = {lora_name(name): value for name, value in state.items()}
    return {"model": model, "model_ema": None, "epoch": 9, "last_elapsed_time": 1.5}


def random_adapter(net: MergeDiT, seed: int, rank: int = 3, alpha: float = 32.0) -> Adapter:
    """Matrices of an adapter, none of them zero."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, parameter in net.named_parameters():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer.endswith(TARGETS):
            out, inner = parameter.shape
            for matrix, shape in (("A", (rank, inner)), ("B", (out, rank))):
                values = torch.randn(shape, generator=generator) * 0.05
                weights[f"{layer}.lora_{matrix}.weight"] = values
    return Adapter(weights, alpha)


def merge_dictionary(tree: MergeTree, lengths: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """The averaging matrix and the sizes at each of these K."""
    cuts = {k: tree.assignment(k) for k in lengths}
    return {k: (cut.pool, cut.sizes.float()) for k, cut in cuts.items()}


def averaged(value: Tensor, updates: int = 20_000, decay: float = 0.9999) -> Tensor:
    """What so many updates of ELIT's average make of a parameter that never changes."""
    average = value.clone()
    for _ in range(updates):
        average.mul_(decay).add_(value, alpha=1 - decay)
    return average


def elit_state(net: SiT) -> Mapping[str, Tensor]:
    """State of ELIT's or SiT's network, with the fixed positions."""
    ours = net.state_dict()
    table = elit_names(len(net.blocks), isinstance(net, ELIT))
    assert set(table.values()) == set(ours)
    return {theirs: ours[name] for theirs, name in table.items()} | {
        "pos_embed": net.pos_embed[None],
        "projectors.0.weight": torch.ones(2, 2),
    }


def elit_content(net: SiT) -> dict[str, Any]:
    """ELIT's checkpoint: the average with its drifted positions, the last weights without."""
    state = elit_state(net)
    average = dict(state) | {"pos_embed": averaged(net.pos_embed)[None]}
    args = argparse.Namespace(model="ELIT-SiT-S/2", learning_rate=1e-4, resolution=256)
    return {"model": state, "ema": average, "args": args, "steps": 20_000}


def main() -> None:
    """Write one file of each kind, small enough for a look."""
    from lgm_scale.families.elit.config import ELITModelConfig, InterfaceConfig, SpaceConfig
    from lgm_scale.families.elit.network import build_elit
    from lgm_scale.families.lgm.config import LGMModelConfig
    from lgm_scale.families.lgm.network import build_merge_dit
    from lgm_scale.families.tokenizer.config import TokenizerModelConfig
    from lgm_scale.families.tokenizer.network import build_tokenizer

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"num_base_tokens": 16, "latent_dim": 8}
    small = TokenizerModelConfig(
        size="tiny", image_size=32, patch_size=8, codebook_size=32, **sizes
    )
    torch.manual_seed(0)
    tokenizer = build_tokenizer(small)
    generator = build_merge_dit(LGMModelConfig(size="tiny", num_classes=3, **sizes))
    windows = InterfaceConfig(split="released", group_size=2, position_rows=4096)
    space = SpaceConfig(kind="sd_vae", image_size=64, vae="vae")
    elit = build_elit(ELITModelConfig(size="s", num_classes=3, interface=windows), space)
    for seed, net in enumerate((tokenizer, generator, elit)):
        shuffle(net, seed)
    args = {"image_size": 32, "variable_method": "ours2"}
    save_tokenizer(tokenizer, args, folder / "tokenizer.pt")
    stats = {"mean": torch.zeros(1, 1, 8), "std": torch.ones(1, 1, 8)}
    torch.save(generator_content(generator), folder / "xl.pth")
    torch.save(stats, folder / "latents_stats.pt")
    torch.save(merge_dictionary(tokenizer.merge_tree(), [4, 8, 12, 16]), folder / "ours2-d32.pt")
    torch.save(lora_content(generator, random_adapter(generator, 3)), folder / "lora_8.pth")
    torch.save(elit_content(elit), folder / "elit.pt")


if __name__ == "__main__":
    main()
