"""Training and sampling steps of the generator, eager and compiled, at several token lengths.

    python -m benchmarks.generator --size s --batch-size 4
    python -m benchmarks.generator --size xl --reference my_models.py:build

A reference is FILE.py:CALLABLE or MODULE:CALLABLE, called without arguments; it gives a module with
the signature of `MergeDiT`, (z_t [B, K, 32], t [B], labels [B], assignment) -> [B, K, 32]. It is
timed in the same rounds, so the ratio holds on a machine that others use, too.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import runpy
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import alternating_medians, command_line, parse_device, print_table
from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.families.lgm.config import DIT_SIZES
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.parallel.blocks import compile_blocks

NUM_CLASSES, LATENT_DIM, NUM_BASE_TOKENS = 1000, 32, 256
Batch = tuple[Tensor, Tensor, Tensor, MergeAssignment]


def build_network(size: str) -> MergeDiT:
    """A generator of 256 base tokens and 1000 classes, with fresh weights."""
    return MergeDiT.from_size(size, LATENT_DIM, NUM_BASE_TOKENS, NUM_CLASSES)


def halving_tree(num_base_tokens: int, num_blocks: int = 4) -> MergeTree:
    """A tree that joins neighbours again and again; N is num_blocks times a power of two.

    What is computed does not depend on which tokens are merged, and no tree has to be learned.
    """
    nodes, merges = list(range(num_base_tokens)), list[tuple[int, int]]()
    while len(nodes) > 1:
        pairs = list(zip(nodes[::2], nodes[1::2], strict=True))
        nodes = [num_base_tokens + len(merges) + place for place in range(len(pairs))]
        merges += pairs
    heights = torch.arange(len(merges), dtype=torch.float64)
    return MergeTree(torch.tensor(merges), heights, num_blocks)


def random_batch(tree: MergeTree, num_tokens: int, batch_size: int, device: torch.device) -> Batch:
    """Random noisy latents [B, K, D], times [B] and labels [B], and the cut at K."""
    z_t = torch.randn(batch_size, num_tokens, LATENT_DIM, device=device)
    labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)
    return z_t, torch.rand(batch_size, device=device), labels, tree.assignment(num_tokens, device)


def load_reference(text: str, device: torch.device) -> nn.Module:
    """Build the network that FILE.py:CALLABLE or MODULE:CALLABLE names, and see that it fits.

    Raises: ConfigError if it cannot be found, built or called.
    """
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise ConfigError(f"--reference: {text!r}; write FILE.py:CALLABLE or MODULE:CALLABLE")
    try:
        is_file = where.endswith(".py")
        found = runpy.run_path(where) if is_file else vars(importlib.import_module(where))
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigError(
            f"--reference: {where} cannot be imported ({error}); name an existing Python file, or "
            "put the module's folder on PYTHONPATH"
        ) from error
    if not callable(found.get(name)):
        raise ConfigError(f"--reference: {where} has no callable {name!r}")
    try:
        net = found[name]().to(device)
        batch = random_batch(halving_tree(NUM_BASE_TOKENS), 32, 2, device)
        with torch.no_grad():
            out = net(*batch)
        problem = None if out.shape == batch[0].shape else f"it gave {list(out.shape)}"
    except Exception as error:  # whatever another's code may raise
        raise _unfit(text, f"{type(error).__name__}: {error}") from error
    if problem:
        raise _unfit(text, problem)
    return net


def _unfit(text: str, problem: str) -> ConfigError:
    return ConfigError(
        f"--reference: {text} does not fit ({problem}); without arguments it must give a module "
        f"that takes z_t [2, 32, {LATENT_DIM}], t [2], labels [2] and the cut at K = 32, and "
        f"answers with [2, 32, {LATENT_DIM}]"
    )


class Step:
    """One step of one network. Training: forward, backward, AdamW; sampling: forward alone."""

    def __init__(self, net: nn.Module, args: argparse.Namespace) -> None:
        self.net = net.to(args.device)
        bf16 = args.dtype == "bfloat16"
        self.autocast = partial(torch.autocast, args.device.type, torch.bfloat16, enabled=bf16)
        fused = args.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=fused)

    def train(self, batch: Batch) -> None:
        """The squared error stands for the loss."""
        with self.autocast():
            v = self.net(*batch)
        (v.float() - batch[0]).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def sample(self, batch: Batch) -> None:
        """One network evaluation."""
        with self.autocast():
            self.net(*batch)


def main() -> int:
    """Time every length in both modes."""
    parser = command_line("generator", __doc__, repeats=10)
    parser.add_argument("--size", choices=list(DIT_SIZES), default="s")
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--no-compile", action="store_true", help="time the eager form alone")
    parser.add_argument("--reference", metavar="WHERE:CALLABLE", help="another network to time")
    args = parse_device(parser, gpu_batch=128, cpu_batch=4)
    net = build_network(args.size)
    networks: dict[str, nn.Module] = {"eager": net}
    if not args.no_compile:
        networks["compiled"] = copy.deepcopy(net)  # equal weights
        compile_blocks(networks["compiled"], args.num_tokens)
    if args.reference:
        networks["reference"] = load_reference(args.reference, args.device)
    steps = {name: Step(network, args) for name, network in networks.items()}
    tree = halving_tree(NUM_BASE_TOKENS)
    for num_tokens in args.num_tokens:
        tree.assignment(num_tokens)  # a length outside the tree is told before the first minute
    others = [name for name in steps if name != "eager"]
    rows = []
    for num_tokens, (mode, passes) in itertools.product(
        args.num_tokens, {"train": 3, "sample": 1}.items()
    ):
        batch = random_batch(tree, num_tokens, args.batch_size, args.device)
        candidates = {name: partial(getattr(step, mode), batch) for name, step in steps.items()}
        medians = alternating_medians(candidates, args.repeats, device=args.device)
        times = [1e3 * value for value in medians.values()]
        ratios = [medians[name] / medians["eager"] for name in others]
        teraflops = args.batch_size * passes * net.flops(num_tokens) / 1e12
        rows.append((num_tokens, mode, *times, *ratios, teraflops / min(medians.values())))
    print(f"{args.size} on {args.device}, {args.dtype}, batch {args.batch_size}; ms per step\n")
    heads = {"K": "", "step": "", **dict.fromkeys(steps, ".1f")}
    heads |= {f"{name} / eager": ".2f" for name in others}
    print_table({**heads, "TFLOP/s of the fastest": ".3g"}, rows)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
