"""What choosing K per image saves: the mean K at a target PSNR, against a fixed K.

Each image gets the smallest K that reaches the target. Two fixed K are put beside their mean: the
one with the same mean PSNR, and the one at which the same share of images reaches the target.
Between measured K both are interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lgm_scale.evaluation.images import StoredImages
from lgm_scale.pixels import psnr, to_uint8, to_unit_range
from lgm_scale.protocols import ImageTokenizer


@dataclass(frozen=True)
class AdaptiveSaving:
    """Mean K of the adaptive mode at one target, and the fixed K it replaces.

    A fixed K is None where no measured K reaches what the adaptive mode does.
    """

    target_psnr: float
    reached: float
    """Share of the images that reach the target; the others count with K = N."""
    mean_tokens: float
    mean_psnr: float
    fixed_tokens_equal_psnr: float | None
    fixed_tokens_equal_share: float | None


def default_lengths(tokenizer: ImageTokenizer) -> list[int]:
    """Token counts that are measured unless others are named: N, N / 2, ..., ascending."""
    lengths = [tokenizer.num_base_tokens]
    while lengths[-1] // 2 >= max(tokenizer.merging.min_tokens, 1):
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]


@torch.inference_mode()
def psnr_table(tokenizer: ImageTokenizer, folder: str | Path, lengths: Sequence[int]) -> np.ndarray:
    """PSNR of every image at every K: float64 [M, len(lengths)]. One encoder pass per image."""
    device = next(tokenizer.parameters()).device
    rows = []
    for batch in StoredImages(folder, tokenizer.image_size).batches():
        images = batch.to(device)
        z = tokenizer.encode(to_unit_range(images))
        decoded = (tokenizer.decode(tokenizer.merging.full_length(z, k)) for k in lengths)
        rows.append(torch.stack([psnr(images, to_uint8(each)) for each in decoded], dim=1).cpu())
    return torch.cat(rows).numpy()


def adaptive_saving(
    table: np.ndarray, lengths: Sequence[int], target_psnr: float
) -> AdaptiveSaving:
    """Adaptive against fixed K, from the PSNR of every image at every K.

    Shapes: table [M, len(lengths)]; lengths ascending, the last one is N.
    """
    hits = table >= target_psnr  # [M, L]
    reached = hits.any(1)
    choice = np.where(reached, hits.argmax(1), len(lengths) - 1)  # [M]
    mean_psnr = float(table[np.arange(len(table)), choice].mean())
    return AdaptiveSaving(
        target_psnr=target_psnr,
        reached=float(reached.mean()),
        mean_tokens=float(np.asarray(lengths)[choice].mean()),
        mean_psnr=mean_psnr,
        fixed_tokens_equal_psnr=_first_crossing(lengths, table.mean(0), mean_psnr),
        fixed_tokens_equal_share=_first_crossing(lengths, hits.mean(0), float(reached.mean())),
    )


def _first_crossing(lengths: Sequence[int], values: np.ndarray, level: float) -> float | None:
    """The smallest K at which the curve through (K, value) reaches the level; None if nowhere."""
    above = np.flatnonzero(values >= level)
    if not len(above):
        return None
    first = above[0]
    if first == 0:
        return float(lengths[0])
    part = (level - values[first - 1]) / (values[first] - values[first - 1])
    return float(lengths[first - 1] + part * (lengths[first] - lengths[first - 1]))


def saving_line(saving: AdaptiveSaving) -> str:
    """One line about a saving, for the console."""

    def against(fixed: float | None) -> str:
        if fixed is None:
            return "none does"
        return f"{fixed:.1f} (the adaptive mode needs {saving.mean_tokens / fixed:.2f} x as many)"

    return (
        f"target {saving.target_psnr:.2f} dB, reached by {saving.reached:.1%}: mean K "
        f"{saving.mean_tokens:.1f} at {saving.mean_psnr:.2f} dB; fixed K of equal mean PSNR "
        f"{against(saving.fixed_tokens_equal_psnr)}, of equally many images at the target "
        f"{against(saving.fixed_tokens_equal_share)}"
    )
