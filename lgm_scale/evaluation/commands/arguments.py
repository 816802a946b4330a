"""Options that several of the commands share, and the rules that they break together."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lgm_scale.bundle import bundle_folder, read_info
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError

if TYPE_CHECKING:
    from lgm_scale.protocols import ImageTokenizer


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Parser of a command of this folder, called as it is called where only the package is."""
    return argparse.ArgumentParser(
        prog=f"python -m lgm_scale.evaluation.commands.{name}", description=description
    )


def add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    """Add --bundle, --images and --lengths: images through a tokenizer."""
    parser.add_argument("--bundle", required=True, help="tokenizer or generator bundle, or demo")
    parser.add_argument("--images", required=True, metavar="MDS", help="from images_to_mds.py")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="K", help="default: N, N/2, ... to the least"
    )


def open_tokenizer(args: argparse.Namespace) -> tuple[ImageTokenizer, dict[str, str]]:
    """Load the tokenizer of --bundle, on a GPU if there is one, and refuse a wrong --lengths.

    Returns: the tokenizer, and the hashes of its files, that of the weights first.
    """
    args.bundle = bundle_folder(args.bundle)
    read_info(args.bundle)
    read_manifest(args.images, "images")
    import torch  # late: what is wrong with a command line is told before

    from lgm_scale.pipeline import load_image_tokenizer

    tokenizer, files = load_image_tokenizer(
        args.bundle, "cuda" if torch.cuda.is_available() else "cpu"
    )
    for k in args.lengths or ():
        try:
            tokenizer.merging.check(k)
        except ConfigError as error:
            raise ConfigError(error.problems[0].replace("num_tokens", "--lengths", 1)) from None
    return tokenizer, files


def add_chunk_options(parser: argparse.ArgumentParser) -> None:
    """Add --batch-size and --chunk-size."""
    parser.add_argument("--batch-size", type=int, default=50, help="images per step and rank")
    parser.add_argument("--chunk-size", type=int, default=250, help="images per file of work")


def not_positive(args: argparse.Namespace, *keys: str) -> Iterator[str]:
    """Lines about options, of one number or several, that are not finite and above 0."""
    for key in keys:
        value = getattr(args, key)
        for number in value if isinstance(value, list) else [value]:
            if not 0 < number < math.inf:
                yield f"--{key.replace('_', '-')}: {number} must be a finite number above 0"
