"""How much the latents of one image agree across token lengths, and how alike merged tokens are.

    python -m lgm_scale.evaluation.commands.alignment --bundle BUNDLE --images MDS --out FOLDER
        [--lengths 8 16 ...]

Writes alignment.json and alignment.png (a heat map).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.evaluation.commands.arguments import (
    add_tokenizer_options,
    command_parser,
    not_positive,
    open_tokenizer,
)
from lgm_scale.start import heavy_imports
from lgm_scale.storage.files import write_whole


def draw_heat_map(result: dict[str, Any], path: Path) -> None:
    """Draw the CKNNA matrix of `measure_alignment` with its numbers, and write it as a PNG."""
    from matplotlib.figure import Figure

    from lgm_scale.evaluation.reconstructions.alignment import DEFINITIONS

    lengths, matrix = result["lengths"], result["cknna"]
    side = 1.5 + 0.6 * len(lengths)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    for row, column in itertools.product(range(len(lengths)), repeat=2):
        value = matrix[row][column]
        color = "black" if value > 0.6 else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(lengths)), [str(k) for k in lengths])
    axes.set_yticks(range(len(lengths)), [str(k) for k in lengths])
    axes.set(
        xlabel="K",
        ylabel="K",
        title=f"CKNNA between lengths ({result['length_control']})\n{DEFINITIONS['cknna']}",
    )
    figure.colorbar(image)
    figure.savefig(path, dpi=120)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = command_parser(
        "alignment", "Alignment of a tokenizer's latents across token lengths (CKNNA)."
    )
    add_tokenizer_options(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--num-images", type=int, default=2000, help="at most so many, evenly spaced (default 2000)"
    )
    parser.add_argument("--neighbors", type=int, default=10, metavar="k", help="default 10")
    return parser.parse_args(argv)


def main() -> int:
    """Measure, write, draw."""
    args = parse_args(sys.argv[1:])
    if problems := list(not_positive(args, "neighbors", "num_images")):
        raise ConfigError(problems)
    tokenizer, files = open_tokenizer(args)
    with heavy_imports():  # late, like torch
        from lgm_scale.evaluation.reconstructions.adaptive import default_lengths
        from lgm_scale.evaluation.reconstructions.alignment import DEFINITIONS, measure_alignment

    weights = next(iter(files.values()))
    lengths = sorted(set(args.lengths or default_lengths(tokenizer)))
    result = measure_alignment(tokenizer, args.images, lengths, args.num_images, args.neighbors)
    out = Path(args.out)
    text = json.dumps({"tokenizer_id": weights} | result, indent=1)
    write_whole(out / "alignment.json", f"{text}\n".encode())
    draw_heat_map(result, out / "alignment.png")
    for key, definition in DEFINITIONS.items():
        print(f"CKNNA ({definition}), mean over pairs of lengths: {_text(result[f'{key}_mean'])}")
    print(f"cosine, all pairs: {_text(result['cosine_all'])}", end="; merged pairs: ")
    print(", ".join(f"K = {k} {_text(v)}" for k, v in result["cosine_merged"].items()))
    return 0


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    exit_on_user_error(main)
