"""The forms of proportional attention, timed against each other and against plain attention.

    python -m benchmarks.attention [--device cuda]

mask: log sizes as a float mask. channel: log sizes in an extra channel of the keys, which leaves
the flash kernels open. flex: added to the scores by FlexAttention, compiled, on a GPU.
`lgm_scale.layers.proportional_attention` uses, per device, the mask or the channel, by default.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import alternating_medians, command_line, parse_device, print_table
from lgm_scale.layers import ATTENTION_FORMS
from lgm_scale.parallel.torch_internals import allow_recompilations

FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v),
    **ATTENTION_FORMS,
}


def inputs(args: argparse.Namespace, num_tokens: int, head_dim: int) -> list[Tensor]:
    """Shapes: q, k, v [B, H, K, C/H], and log sizes [K]."""
    dtype = getattr(torch, args.dtype)
    shape = (args.batch_size, args.num_heads, num_tokens, head_dim)
    qkv = [
        torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True) for _ in range(3)
    ]
    sizes = torch.randint(1, 2 * 256 // num_tokens + 1, (num_tokens,), device=args.device)
    return [*qkv, sizes.float().log()]


def forward(form: Callable[..., Tensor], *tensors: Tensor) -> None:
    """One evaluation, without a graph."""
    form(*(tensor.detach() for tensor in tensors))


def both(form: Callable[..., Tensor], *tensors: Tensor) -> None:
    """One training pass, forward and backward."""
    out = form(*tensors)
    torch.autograd.grad(out, tensors[:3], torch.ones_like(out))


def main() -> int:
    """Time every length, head width and direction."""
    parser = command_line("attention", __doc__, repeats=20)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 72, 80])
    args = parse_device(parser, gpu_batch=256, cpu_batch=4)
    flex = FORMS.pop("flex")
    if args.device.type == "cuda":  # without a compiler FlexAttention is no kernel
        FORMS["flex"] = torch.compile(flex, dynamic=False)
        allow_recompilations(4 * len(args.head_dims) * len(args.num_tokens))
    rows = []
    for head_dim, num_tokens in itertools.product(args.head_dims, args.num_tokens):
        tensors = inputs(args, num_tokens, head_dim)
        for direction in (forward, both):
            candidates = {name: partial(direction, form, *tensors) for name, form in FORMS.items()}
            medians = alternating_medians(candidates, args.repeats, device=args.device)
            times = [1e3 * value for value in medians.values()]
            ratio = medians["channel"] / medians["mask"]
            rows.append((head_dim, num_tokens, direction.__name__, *times, ratio))
    print(f"{args.device}, {args.dtype}, batch {args.batch_size}, {args.num_heads} heads; ms\n")
    heads = {"head width": "", "K": "", "pass": "", **dict.fromkeys(FORMS, ".3f")}
    print_table({**heads, "channel / mask": ".2f"}, rows)
    wins = sum(row[-1] < 1 for row in rows)
    print(f"\nchannel is faster in {wins} of {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
