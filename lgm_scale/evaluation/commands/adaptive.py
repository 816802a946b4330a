"""What choosing K per image saves: the mean K at a target PSNR, against a fixed K.

python -m lgm_scale.evaluation.commands.adaptive --bundle BUNDLE --images MDS
    --target-psnr DB [DB ...] [--lengths 8 16 ...] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.evaluation.commands.arguments import (
    add_tokenizer_options,
    command_parser,
    not_positive,
    open_tokenizer,
)
from lgm_scale.start import heavy_imports
from lgm_scale.storage.files import write_json


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = command_parser("adaptive", "Mean K saved by choosing K per image, against a fixed K.")
    add_tokenizer_options(parser)
    parser.add_argument("--target-psnr", required=True, type=float, nargs="+", metavar="DB")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    return parser.parse_args(argv)


def main() -> int:
    """Measure once, compare at each target."""
    args = parse_args(sys.argv[1:])
    if problems := list(not_positive(args, "target_psnr")):
        raise ConfigError(problems)
    tokenizer, _ = open_tokenizer(args)
    with heavy_imports():  # late, like torch
        from lgm_scale.evaluation.reconstructions.adaptive import (
            adaptive_saving,
            default_lengths,
            psnr_table,
            saving_line,
        )

    size = tokenizer.num_base_tokens
    lengths = sorted({*(args.lengths or default_lengths(tokenizer)), size})
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
        write_json(Path(args.out), result)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
