"""Make a reference: statistics and features that samples are compared with.

    python -m lgm_scale.evaluation.commands.reference SOURCE --out FILE.safetensors
        [--inception FILE] [--dinov2 FILE]
    composer -n 8 -m lgm_scale.evaluation.commands.reference SOURCE --out FILE.safetensors ...

SOURCE is a folder of images, MDS shards, ADM's npz (statistics and 10 000 images), another npz
with mu and sigma, or EDM2's pkl. Statistics that a file has are kept as they are; images are put
through the networks whose weights are given, for what is missing: features (KID, precision,
recall) and statistics. The same command again goes on where it was interrupted. Exit status: 0
done, 2 for anything the user must mend.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.evaluation.commands.arguments import (
    add_chunk_options,
    command_parser,
    not_positive,
)
from lgm_scale.evaluation.features.files import REFERENCE, weights_of
from lgm_scale.published import COMMAND, PUBLISHED
from lgm_scale.start import heavy_imports


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = command_parser(
        "reference", "Statistics and features of reference images, in one file."
    )
    parser.add_argument("source", type=Path, help="folder of images, MDS shards, .npz or .pkl")
    parser.add_argument("--out", required=True, metavar="FILE", help="ends in .safetensors")
    parser.add_argument("--inception", metavar="FILE", help="Inception's weights")
    parser.add_argument("--dinov2", metavar="FILE", help="DINOv2's weights")
    parser.add_argument(
        "--fashion-mnist", action="store_true",
        help="Fashion-MNIST's images, for the metrics of its classifier (no file is needed)",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, help="for a folder of images: centre crop")
    parser.add_argument(
        "--keep-features", type=int, default=10_000, metavar="M",
        help="images whose features are kept, evenly spaced (10000, as ADM's)",
    )  # fmt: skip
    parser.add_argument("--name", help="of the reference in results; default: that of the source")
    add_chunk_options(parser)
    return parser.parse_args(argv)


def main() -> int:
    """Make, write, say what it unlocks."""
    args = parse_args(sys.argv[1:])
    options = vars(args)
    out = Path(options.pop("out"))
    problems = []
    if out.suffix != ".safetensors":
        problems.append(f"--out: {out} must end in .safetensors")
    problems += not_positive(args, "batch_size", "chunk_size")
    if args.image_size is not None:
        problems += not_positive(args, "image_size")
    if args.keep_features < 0:
        problems.append(f"--keep-features: {args.keep_features} must be 0 or more")
    problems += [f"--{asset.missing_line}" for asset in weights_of(options) if not asset.present]
    if not args.source.exists():
        problems.append(
            f"SOURCE: {args.source} does not exist; `{COMMAND} --fetch {REFERENCE[0]}` gets ADM's "
            f"for ImageNet 256x256 as {PUBLISHED[REFERENCE[0]].path}, or give your images"
        )
    if problems:
        raise ConfigError(problems)
    with heavy_imports():  # late: what is wrong with a command line is told before
        from composer.utils import dist

        from lgm_scale.evaluation.references.files import save_reference
        from lgm_scale.evaluation.references.making import make_reference

    work = Path(f"{out}.work")
    reference = make_reference(work=work, **options)
    if dist.get_global_rank() == 0:
        save_reference(out, reference)
        shutil.rmtree(work, ignore_errors=True)
        print(f"{out}: {reference.name}; {', '.join(reference.held())}")
    dist.barrier()
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
