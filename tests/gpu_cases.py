"""Small networks of every family, and what is computed with them on a CPU and on a GPU.

Composer and streaming are not imported: a GPU machine may lack them. Weights are random.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.generator import halving_tree
from lgm_scale.families.elit.network import ELIT, SiT
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import Tokenizer

BATCH, TOKENS, CLASSES = 4, 64, 10
TREE = halving_tree(TOKENS)
WIDTH, HEADS = 144, 2  # heads of 72 channels, as XL has them
Call = Callable[[Any, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Case:
    """A network, its input besides times [B] and labels [B], and how it is called at K tokens."""

    build: Callable[[], nn.Module]
    shape: Callable[[int], tuple[int, ...]]
    call: Call
    lengths: tuple[int, int]

    def network(self, dtype: torch.dtype = torch.float32) -> Any:
        """The network; the same weights each time, and none of them zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = self.build()
            for parameter in net.parameters():
                parameter.data += 0.03 * torch.randn_like(parameter)
        return net.to(dtype)

    def inputs(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input, times and labels, the null label among them."""
        generator = torch.Generator().manual_seed(num_tokens)
        x = torch.randn(BATCH, *self.shape(num_tokens), generator=generator)
        t = torch.rand(BATCH, generator=generator)
        return x, t, torch.tensor([0, 3, CLASSES - 1, CLASSES])


def _lgm(net: MergeDiT, x: Tensor, t: Tensor, labels: Tensor, num_tokens: int) -> Tensor:
    return net(x, t, labels, TREE.assignment(num_tokens, x.device))


def _grid(net: SiT, x: Tensor, t: Tensor, labels: Tensor, num_tokens: int) -> Tensor:
    return net(x, t, labels, num_tokens)


def _tokenizer(net: Tokenizer, x: Tensor, t: Tensor, labels: Tensor, num_tokens: int) -> Tensor:
    z = net.encode(x)
    return net.decode(net.merging(z, num_tokens, lambda: TREE))


_SIT = (WIDTH, 4, HEADS, 4, 16, 2, CLASSES)
CASES = {
    "lgm": Case(
        lambda: MergeDiT(WIDTH, 2, HEADS, 8, TOKENS, CLASSES), lambda k: (k, 8), _lgm, (16, TOKENS)
    ),
    "elit": Case(
        lambda: ELIT(*_SIT, head_blocks=1, tail_blocks=1, group_size=4, position_rows=TOKENS),
        lambda k: (4, 16, 16),
        _grid,
        (16, TOKENS),
    ),
    "sit": Case(lambda: SiT(*_SIT), lambda k: (4, 16, 16), _grid, (TOKENS, TOKENS)),
    "tokenizer": Case(
        lambda: Tokenizer(
            TokenizerModelConfig(
                size="tiny", image_size=32, patch_size=8, num_base_tokens=TOKENS,
                latent_dim=8, codebook_size=32,
            )
        ),
        lambda k: (3, 32, 32),
        _tokenizer,
        (16, TOKENS),
    ),
}  # fmt: skip


def outputs_and_gradients(
    case: Case, net: nn.Module, num_tokens: int, device: torch.device, bf16: bool = False
) -> dict[str, Tensor]:
    """The output, and the gradient of its product with a fixed random tensor; on the host."""
    net = net.to(device)
    dtype = next(net.parameters()).dtype
    x, t, labels = (value.to(device) for value in case.inputs(num_tokens))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        out = case.call(net, x.to(dtype), t, labels, num_tokens)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    net.zero_grad()
    (out.to(dtype) * towards.to(device, dtype)).sum().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu().double() for name, value in {"out": out, **found}.items()}


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Length of each tensor's error over the tensor's own length, or over a thousandth of the
    longest where that is longer: a gradient that is zero but for rounding has no digits."""
    assert found.keys() == expected.keys()
    longest = max(value.norm().item() for name, value in expected.items() if name != "out")
    return {
        name: (found[name] - value).norm().item() / max(value.norm().item(), 1e-3 * longest)
        for name, value in expected.items()
    }


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """An error for whatever makes the host wait for the GPU; events may be waited for."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
