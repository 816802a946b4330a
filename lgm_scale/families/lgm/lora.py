"""LoRA per length: low-rank changes to a frozen generator, one set for each token length.

One generator for all lengths is a compromise between them under 'legacy' noise; a small change per
K takes it back. Training goes through peft, which is imported only there. What is kept are plain
matrices under plain names; sampling adds their products to a copy of the weights and costs no more
than without.

Source: the release trains one such set per K for its published numbers ('legacy' noise).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lgm_scale.errors import CheckpointError
from lgm_scale.families.lgm.network import MergeDiT

TARGETS = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")
"""The layers of a block that an adapter changes."""

_NAME = "default"  # peft's own, for one adapter


def _target_layers(net: MergeDiT) -> dict[str, nn.Linear]:
    """The layers that an adapter changes, by their names."""
    return {
        f"blocks.{index}.{target}": block.get_submodule(target)  # type: ignore[misc]  # all Linear
        for index, block in enumerate(net.blocks)
        for target in TARGETS
    }


def adapter_shapes(net: MergeDiT, rank: int) -> dict[str, tuple[int, int]]:
    """Shape of each matrix of an adapter of this rank, by its name."""
    shapes = {}
    for name, layer in _target_layers(net).items():
        shapes[f"{name}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"{name}.lora_B.weight"] = (layer.out_features, rank)
    return shapes


@dataclass(frozen=True)
class Adapter:
    """The change W + alpha / rank * B A of each layer in `TARGETS`.

    Args:
        weights: For each layer, `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight`
            [out, rank], float32.
        alpha: Numerator of the scale alpha / rank, which keeps the change's size as rank varies.
    """

    weights: dict[str, Tensor]
    alpha: float

    def change(self, layer: str) -> Tensor:
        """What is added to a layer's weight, B A times alpha / rank: [out, in]."""
        down = self.weights[f"{layer}.lora_A.weight"]
        up = self.weights[f"{layer}.lora_B.weight"]
        return (up @ down) * (self.alpha / len(down))

    def to(self, device: torch.device | str) -> Adapter:
        """Return the same adapter on another device."""
        return Adapter({name: value.to(device) for name, value in self.weights.items()}, self.alpha)

    def check(self, net: MergeDiT) -> None:
        """Raise CheckpointError unless it has the shapes of this network."""
        shapes = {name: tuple(value.shape) for name, value in self.weights.items()}
        ranks = {shape[0] for name, shape in shapes.items() if name.endswith("lora_A.weight")}
        expected = adapter_shapes(net, min(ranks, default=0))
        wrong = sorted(
            name
            for name in shapes.keys() | expected.keys()
            if shapes.get(name) != expected.get(name)
        )
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"an adapter for another network: {name} is {shapes.get(name, 'missing')}, "
                f"expected {expected.get(name, 'nothing')} ({len(wrong)} such)"
            )


def add_adapter(net: MergeDiT, rank: int, alpha: float) -> None:
    """Freeze the network and give it a trainable adapter, in place; at first it changes nothing.

    The adapter's parameters are then the only ones that require a gradient.
    """
    from peft import LoraConfig, inject_adapter_in_model

    net.requires_grad_(False)  # before the adapter exists, whose own weights stay trainable
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(TARGETS), lora_dropout=0.0, bias="none"  # type: ignore[arg-type]  # a float scale works
    )  # fmt: skip
    inject_adapter_in_model(config, net, adapter_name=_NAME)


def plain_names(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of an added adapter under the names that `Adapter` has."""
    return {
        name.replace(f".{_NAME}.weight", ".weight"): value for name, value in parameters.items()
    }


def with_adapter(net: MergeDiT, adapter: Adapter) -> MergeDiT:
    """A network with the adapter's changes in its weights; all other tensors are shared with `net`.

    Raises: CheckpointError if the adapter is another network's.
    """
    adapter.check(net)
    changed = {id(layer.weight) for layer in _target_layers(net).values()}
    tensors = [*net.parameters(), *net.buffers()]
    # A memo that names a tensor as its own copy makes deepcopy share it: one set of large weights
    # serves every length, and only the adapted layers exist once per K.
    shared = {id(tensor): tensor for tensor in tensors if id(tensor) not in changed}
    # Also when first asked for while sampling: the result is as usable as `net` itself.
    with torch.inference_mode(False), torch.no_grad():
        adapted = copy.deepcopy(net, dict(shared))
        for name, layer in _target_layers(adapted).items():
            layer.weight += adapter.change(name).to(layer.weight)
    return adapted
