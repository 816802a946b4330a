"""As many tokens as an image needs: the smallest K whose reconstruction reaches a target PSNR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lgm_scale.errors import ConfigError
from lgm_scale.pixels import psnr, to_uint8


class LengthChoice(NamedTuple):
    """One K per image, and what it gives.

    Shapes: num_tokens [B] int64, psnr [B] float64 in dB at that K, reached [B] bool.
    Where no K reaches the target, num_tokens is N and reached is False.
    """

    num_tokens: Tensor
    psnr: Tensor
    reached: Tensor


def choose_length(
    images: Tensor,
    z: Tensor,
    reconstruct: Callable[[Tensor, int], Tensor],
    target_psnr: float,
    lengths: Sequence[int],
) -> LengthChoice:
    """Per image, the smallest of the lengths that reaches the target.

    Lengths are tried in ascending order, each on the images that no smaller one satisfied: PSNR
    need not grow with K, and the first hit is the smallest. One host synchronisation per length.

    Shapes: images [B, 3, S, S] in [-1, 1], z [B, N, D], their latents at full length; `reconstruct`
    is (z, K) -> images, and called on a part of the batch. N is tried last, also where it is no
    candidate.

    Raises: ConfigError if there is no length to try.
    """
    size = z.shape[1]
    if not lengths:
        raise ConfigError("lengths: empty; name at least one token count to choose from")
    candidates = sorted({*lengths, size})
    if candidates[-1] > size:
        raise ConfigError(f"lengths: {candidates[-1]} is above the {size} tokens of an image")
    num_tokens = torch.full((len(images),), size, device=z.device)
    # What is known stays on the device: only the choice of what to decode next is read.
    best = torch.zeros(len(images), dtype=torch.float64, device=z.device)
    reached = torch.zeros(len(images), dtype=torch.bool, device=z.device)
    originals = to_uint8(images)  # PSNR of 8-bit images, as evaluation measures it
    for k in candidates:
        open_ones = (~reached).nonzero()[:, 0]  # the one host synchronisation
        if not len(open_ones):
            break
        value = psnr(originals[open_ones], to_uint8(reconstruct(z[open_ones], k)))
        best[open_ones] = value  # also where it is missed: at K = N it is what there is
        hit = open_ones[value >= target_psnr]
        num_tokens[hit], reached[hit] = k, True
    return LengthChoice(num_tokens, best, reached)
