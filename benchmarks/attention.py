"""Two forms of proportional attention, timed against each other and against plain attention.

    python -m benchmarks.attention [--device cuda]

mask: log sizes as a float mask. channel: log sizes in an extra channel of the keys, which leaves
the flash kernels open. `lgm_scale.layers.proportional_attention` uses, per device, the one
that is faster here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import alternating_medians, print_table
from lgm_scale.layers import extra_channel_attention, masked_attention

FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v),
    "mask": masked_attention,
    "channel": extra_channel_attention,
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: by device")
    parser.add_argument("--batch-size", type=int, help="default: 256 on a GPU, 4 on a CPU")
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 72, 80])
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args(argv)


def inputs(args: argparse.Namespace, num_tokens: int, head_dim: int) -> list[Tensor]:
    """Shapes: q, k, v [B, H, K, C/H], and log sizes [K]."""
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    shape = (args.batch_size, args.num_heads, num_tokens, head_dim)
    qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    sizes = torch.randint(1, 2 * 256 // num_tokens + 1, (num_tokens,), device=device)
    return [*qkv, sizes.float().log()]


def forward_and_backward(
    form: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor
) -> None:
    """One training pass."""
    out = form(q, k, v, log_sizes)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def main() -> int:
    """Time every length, head width and direction."""
    args = parse_args(sys.argv[1:])
    device = torch.device(args.device)
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    args.batch_size = args.batch_size or (256 if device.type == "cuda" else 4)
    rows, wins = [], 0
    for head_dim in args.head_dims:
        for num_tokens in args.num_tokens:
            tensors = inputs(args, num_tokens, head_dim)
            frozen = [tensor.detach() for tensor in tensors]
            for direction in ("forward", "both"):
                candidates = {
                    name: partial(form, *frozen)
                    if direction == "forward"
                    else partial(forward_and_backward, form, *tensors)
                    for name, form in FORMS.items()
                }
                medians = alternating_medians(candidates, device, args.repeats)
                ratio = medians["channel"] / medians["mask"]
                wins += ratio < 1
                rows.append(
                    [str(head_dim), str(num_tokens), direction]
                    + [f"{1e3 * medians[name]:.3f}" for name in FORMS]
                    + [f"{ratio:.2f}"]
                )
    print(f"{device.type}, {args.dtype}, batch {args.batch_size}, {args.num_heads} heads; ms\n")
    print_table(["head width", "K", "pass", *FORMS, "channel / mask"], rows)
    print(f"\nchannel is faster in {wins} of {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
