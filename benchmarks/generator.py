"""Training and sampling steps of the generator, eager and compiled, at several token lengths.

    python -m benchmarks.generator --size s --batch-size 4
    python -m benchmarks.generator --size xl --reference my_models.py:build

A reference is a callable without arguments that gives a module with the signature of `MergeDiT`
(z_t [B, K, D], t [B], labels [B], assignment) -> [B, K, D]; it is timed in the same rounds, so
the ratio holds on a machine that others use, too.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import alternating_medians, print_table
from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.families.lgm.network import DIT_SIZES, MergeDiT
from lgm_scale.flops import dit_flops
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.parallel.blocks import compile_blocks

NUM_CLASSES, LATENT_DIM, NUM_BASE_TOKENS = 1000, 32, 256


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generator", description=__doc__)
    parser.add_argument("--size", choices=list(DIT_SIZES), default="s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: by device")
    parser.add_argument("--batch-size", type=int, help="default: 128 on a GPU, 4 on a CPU")
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true", help="time the eager form alone")
    parser.add_argument("--reference", metavar="PATH:ATTR", help="another network to time")
    return parser.parse_args(argv)


def load_reference(text: str) -> nn.Module:
    """Build the network that PATH:ATTR names. Raises: ConfigError."""
    path, _, attribute = text.rpartition(":")
    if not path or not Path(path).is_file():
        raise ConfigError(f"--reference: {text!r} is not PATH:ATTR with an existing Python file")
    spec = importlib.util.spec_from_file_location("reference_network", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise ConfigError(f"--reference: {path} has no {attribute!r}")
    return getattr(module, attribute)()


def build_networks(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The networks to compare, with equal weights where they are ours."""
    net = MergeDiT.from_size(args.size, LATENT_DIM, NUM_BASE_TOKENS, NUM_CLASSES)
    networks: dict[str, nn.Module] = {"eager": net}
    if not args.no_compile:
        compiled = copy.deepcopy(net)
        compile_blocks(compiled, args.num_tokens)
        networks["compiled"] = compiled
    if args.reference:
        networks["reference"] = load_reference(args.reference)
    return {name: network.to(args.device) for name, network in networks.items()}


class Step:
    """One step of one network. Training: forward, backward, AdamW; sampling: forward alone."""

    def __init__(self, net: nn.Module, args: argparse.Namespace) -> None:
        self.net = net
        self.autocast = partial(
            torch.autocast,
            torch.device(args.device).type,
            torch.bfloat16,
            enabled=args.dtype == "bfloat16",
        )
        fused = torch.device(args.device).type == "cuda"
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=fused)

    def train(self, batch: tuple[Tensor, Tensor, Tensor, MergeAssignment]) -> None:
        """The squared error stands for the loss."""
        with self.autocast():
            v = self.net(*batch)
        (v.float() - batch[0]).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def sample(self, batch: tuple[Tensor, Tensor, Tensor, MergeAssignment]) -> None:
        """One network evaluation."""
        with self.autocast():
            self.net(*batch)


def make_batch(
    tree: MergeTree, num_tokens: int, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor, MergeAssignment]:
    """Random inputs at one length, on the device."""
    size, device = args.batch_size, args.device
    z_t = torch.randn(size, num_tokens, LATENT_DIM, device=device)
    labels = torch.randint(NUM_CLASSES, (size,), device=device)
    return z_t, torch.rand(size, device=device), labels, tree.assignment(num_tokens, device)


def main() -> int:
    """Time every length in both modes."""
    args = parse_args(sys.argv[1:])
    device = torch.device(args.device)
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    args.batch_size = args.batch_size or (128 if device.type == "cuda" else 4)
    networks = build_networks(args)
    steps = {name: Step(net, args) for name, net in networks.items()}
    tree = MergeTree.from_embeddings(torch.randn(NUM_BASE_TOKENS, 64))
    for num_tokens in args.num_tokens:
        tree.assignment(num_tokens)  # a length outside the tree is told before the first minute
    rows = []
    net = networks["eager"]
    assert isinstance(net, MergeDiT)
    for num_tokens in args.num_tokens:
        batch = make_batch(tree, num_tokens, args)
        for mode, passes in (("train", 3), ("sample", 1)):
            candidates: dict[str, Callable[[], object]] = {
                name: partial(getattr(step, mode), batch) for name, step in steps.items()
            }
            medians = alternating_medians(candidates, device, args.repeats)
            teraflops = args.batch_size * passes * dit_flops(net, num_tokens) / 1e12
            row = [str(num_tokens), mode, *(f"{1e3 * medians[name]:.1f}" for name in steps)]
            row += [f"{medians[name] / medians['eager']:.2f}" for name in steps if name != "eager"]
            rows.append([*row, f"{teraflops / min(medians.values()):.3g}"])
    print(f"{args.size} on {device.type}, {args.dtype}, batch {args.batch_size}; ms per step\n")
    ratios = [f"{name} / eager" for name in steps if name != "eager"]
    print_table(["K", "step", *steps, *ratios, "TFLOP/s of the fastest"], rows)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
