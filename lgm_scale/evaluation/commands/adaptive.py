"""What choosing K per image saves: the mean K at a target PSNR, against a fixed K.

    python -m eval.adaptive --bundle BUNDLE --images MDS --target-psnr DB [DB ...]
        [--lengths 8 16 ...] [--out FILE.json]

Each image gets the smallest K that reaches the target (`Tokenizer.choose_length`). Two fixed K
are put beside their mean: the one with the same mean PSNR, and the one at which the same share of
images reaches the target. Between measured K both are interpolated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.families.tokenizer.bundle import load_tokenizer
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.pixels import psnr, to_uint8, to_unit_range

__all__ = [
    "AdaptiveSaving",
    "adaptive_saving",
    "default_lengths",
    "image_batches",
    "psnr_table",
    "saving_line",
]


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


def image_batches(
    folder: str | Path, image_size: int, num_images: int | None = None, batch_size: int = 64
) -> Iterator[Tensor]:
    """The images of an MDS folder, in order: uint8 [B, 3, S, S].

    With `num_images`, so many of them, evenly spaced: a folder is sorted by class.
    """
    count = read_manifest(folder, "images").num_samples
    wanted = count if num_images is None else min(num_images, count)
    indices = (np.arange(wanted) * count // max(wanted, 1)).tolist()
    dataset = ImageDataset(folder, image_size=image_size, train=False, seed=0, batch_size=1)
    for start in range(0, wanted, batch_size):
        items = [dataset[index]["images"] for index in indices[start : start + batch_size]]
        yield torch.stack(items)


def default_lengths(tokenizer: Tokenizer) -> list[int]:
    """N, N / 2, ... as far as the length control goes, ascending."""
    lengths = [tokenizer.num_base_tokens]
    while lengths[-1] // 2 >= max(tokenizer.merging.min_tokens, 1):
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]


@torch.inference_mode()
def psnr_table(tokenizer: Tokenizer, folder: str | Path, lengths: Sequence[int]) -> np.ndarray:
    """PSNR of every image at every K: float64 [M, len(lengths)]. One encoder pass per image."""
    device = next(tokenizer.parameters()).device
    rows = []
    for batch in image_batches(folder, tokenizer.image_size):
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
    """A saving for the console."""

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


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.adaptive",
        description="Mean K saved by choosing K per image, against a fixed K.",
    )
    parser.add_argument("--bundle", required=True, help="tokenizer or generator bundle")
    parser.add_argument("--images", required=True, metavar="MDS", help="from images_to_mds.py")
    parser.add_argument("--target-psnr", required=True, type=float, nargs="+", metavar="DB")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="K", help="default: N, N/2, ... to the least"
    )
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    return parser.parse_args(argv)


def main() -> int:
    """Measure once, compare at each target."""
    args = parse_args(sys.argv[1:])
    tokenizer = load_tokenizer(args.bundle, "cuda" if torch.cuda.is_available() else "cpu")
    size = tokenizer.num_base_tokens
    lengths = sorted({*(args.lengths or default_lengths(tokenizer)), size})
    for k in lengths:
        tokenizer.merging.check(k)  # refuse a wrong K before the work
    table = psnr_table(tokenizer, args.images, lengths)
    if not len(table):
        raise ConfigError(f"--images: {args.images} holds no images")
    savings = [adaptive_saving(table, lengths, target) for target in args.target_psnr]
    print("\n".join(saving_line(saving) for saving in savings))
    if args.out:
        result = {
            "num_images": len(table),
            "lengths": lengths,
            "mean_psnr": table.mean(0).tolist(),
            "targets": [asdict(saving) for saving in savings],
        }
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
