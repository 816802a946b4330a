"""Encode images to latents of both flips, stored in float16.

    composer -m lgm_scale.data.preparation.encode --tokenizer BUNDLE --images MDS --out MDS
    composer -m lgm_scale.data.preparation.encode --encoder NAME ... --images MDS --out MDS

The images are cut into runs of the size of a shard; every rank encodes some of them, and rank 0
joins the records. Which images a shard holds, and its bytes, depend on neither ranks nor
interruptions; the manifest says so for each shard, and that every image is in exactly one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping

from lgm_scale.data.config import SourceConfig, broken_source
from lgm_scale.data.preparation.parts import DEFAULT_SHARD_SIZE, check_shard_options
from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.families.base import Tool, imported, latent_encoders
from lgm_scale.start import heavy_imports


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, Tool]:
    """Parse the command line: the options, and the encoder that they choose.

    Raises: ConfigError with every problem.
    """
    encoders = latent_encoders()
    parser = argparse.ArgumentParser(
        prog="composer -m lgm_scale.data.preparation.encode",
        description="Encode an MDS folder of images to latents. The same command again, with any "
        "number of ranks, goes on after the shards that are finished.",
    )
    add = parser.add_argument
    default = next(iter(encoders))
    add("--encoder", choices=tuple(encoders), default=default, help=f"(default: {default})")
    for name, encoder in encoders.items():
        group = parser.add_argument_group(f"with --encoder {name}")
        for flag, settings in encoder.options.items():
            group.add_argument(flag, **settings)
    add("--images", required=True, metavar="MDS", help="folder of images, local or s3://...")
    add("--cache", metavar="DIR", help="local folder for the shards of remote --images")
    add("--out", required=True, metavar="MDS", help="folder to write, local (on a file system "
        "that all ranks share) or s3://...")  # fmt: skip
    add("--staging", metavar="DIR", help="local folder for unfinished work, for remote --out")
    add("--batch-size", type=int, default=64, help="images per step and rank (default: 64)")
    shard_help = f"of a shard, about (default: {DEFAULT_SHARD_SIZE})"
    add("--shard-size", type=int, default=DEFAULT_SHARD_SIZE, metavar="BYTES", help=shard_help)
    add("--compression", metavar="ALGORITHM", help="of shards, such as zstd:3 (default: none)")
    workers = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    workers_help = f"processes per rank that decode images (default: {workers})"
    add("--workers", type=int, default=workers, help=workers_help)
    args = parser.parse_args(argv)
    problems = list(_broken_encoder(args, encoders))
    if args.batch_size < 1:
        problems.append(f"--batch-size: {args.batch_size} must be 1 or more")
    if args.workers < 0:
        problems.append(f"--workers: {args.workers} must be 0 or more")
    source = SourceConfig(path=args.images, cache=args.cache)
    problems += [text.replace("data.cache", "--cache") for text in broken_source(source)]
    if problems:
        raise ConfigError(problems)
    check_shard_options(args.shard_size, args.compression)
    return args, encoders[args.encoder]


def _broken_encoder(args: argparse.Namespace, encoders: Mapping[str, Tool]) -> Iterator[str]:
    """Options that the chosen encoder lacks or has no use for."""
    chosen = args.encoder
    for name, encoder in encoders.items():
        for flag in encoder.options:
            given = getattr(args, flag.removeprefix("--").replace("-", "_")) is not None
            if name == chosen and flag in encoder.needed and not given:
                default = " (the default)" if name == next(iter(encoders)) else ""
                yield f"{flag}: missing; --encoder {name}{default} needs {encoder.needed[flag]}"
            if name != chosen and given:
                yield (
                    f"{flag}: has no effect with --encoder {chosen}; drop it, or set "
                    f"--encoder {name}"
                )


def main() -> int:
    """Encode, join, describe."""
    args, tool = parse_args(sys.argv[1:])
    with heavy_imports():
        from lgm_scale.data.preparation.latents import encode_images

    return encode_images(args, imported(tool.target))


if __name__ == "__main__":
    exit_on_user_error(main)
