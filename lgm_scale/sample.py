"""Draw a labelled grid of images from a generator bundle, or make many images.

    python -m lgm_scale.sample BUNDLE --classes goldfish 207 --num-tokens 32 64 128 --out grid.png

One row per token length, one column per class. A column shares its noise: down the rows it is one
picture at growing detail, or from a generator on a grid at growing work.

    composer -n 8 -m lgm_scale.sample BUNDLE --num-images 50000 --num-tokens 64 --out FOLDER

At one length, of all classes in turn or of those given, as PNG files or as FILE.npz. The same
command again makes what is missing, with any number of ranks (docs/sampling.md).
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from lgm_scale.bundle import check_kind, local_bundle, read_info
from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.families.base import add_import_option
from lgm_scale.families.generator import generator_families
from lgm_scale.sampling.config import SamplerConfig
from lgm_scale.start import heavy_imports

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_MARGIN = 4
GRID_CLASSES = 10
"""Columns of a grid for which no class was named."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lgm_scale.sample",
        description="Draw a labelled grid of images from a generator bundle, or make many images "
        "(--num-images). The same command again makes those that are missing.",
    )
    parser.add_argument(
        "bundle",
        help="generator bundle of any family, owner/name on the model hub, or demo: that of the "
        "package",
    )
    parser.add_argument(
        "--classes", nargs="+",
        help="indices or names; with --num-images in turn, or CLASS=COUNT each (default: all; of a "
        f"grid the first {GRID_CLASSES})",
    )  # fmt: skip
    parser.add_argument("--num-tokens", nargs="+", type=int, help="rows; default: all tokens")
    parser.add_argument(
        "--out", required=True,
        help="image file to write; with --num-images a folder of PNG files, or a file .npz",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-images", type=int, metavar="M", help="make M images, and no grid")
    parser.add_argument(
        "--batch-size", type=int, help="images at once and rank; default: what fits the device"
    )
    parser.add_argument(
        "--chunk-size", type=int,
        help="with --num-images: images per piece of work, which a kill can lose (default: 250)",
    )  # fmt: skip
    add_sampler_options(parser)
    parser.add_argument(
        "--grow", nargs="+", metavar="T:K",
        help="growing length: from shifted time T on K tokens; the row's own length ends it",
    )  # fmt: skip
    parser.add_argument("--device", help="default: a CUDA device if there is one")
    parser.add_argument(
        "--cuda-graphs", action="store_true",
        help="replay the network as CUDA graphs: the same numbers, for small batches (not "
        "measured on a GPU yet)",
    )  # fmt: skip
    add_import_option(parser)
    args = parser.parse_args(argv)
    for key in ("num_images", "batch_size", "chunk_size"):
        value = getattr(args, key)
        if value is not None and value < 1:
            parser.error(f"--{key.replace('_', '-')}: {value} must be 1 or more")
    if args.num_images is None and args.chunk_size is not None:
        parser.error("--chunk-size goes with --num-images; a grid has no pieces of work")
    return args


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `SamplerConfig`; growing length is --grow, which fits every row."""
    hints = get_type_hints(SamplerConfig)
    for entry in fields(SamplerConfig):
        if entry.name == "length_schedule":
            continue
        kind, options = hints[entry.name], {"help": entry.metadata["help"]}
        if isinstance(kind, type) and issubclass(kind, Enum):
            options["choices"] = [member.value for member in kind]
        elif get_origin(kind) is tuple:
            options |= {"nargs": 2, "type": float, "metavar": ("LO", "HI")}
        else:
            options["type"] = float if kind is float else int
        parser.add_argument(f"--{entry.name.replace('_', '-')}", **options)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about the sampler; what it does not, the bundle does."""
    given = {entry.name: getattr(args, entry.name, None) for entry in fields(SamplerConfig)}
    return {name: value for name, value in given.items() if value is not None}


def growth_of(entries: list[str] | None) -> list[tuple[float, int]]:
    """Parse `T:K` entries. Raises: ConfigError."""
    growth = []
    for entry in entries or []:
        try:
            t, num_tokens = entry.split(":")
            growth.append((float(t), int(num_tokens)))
        except ValueError:
            raise ConfigError(f"--grow: {entry!r} is not T:K, for example 0.1:64") from None
    return growth


def schedule_for(growth: list[tuple[float, int]], num_tokens: int) -> tuple[tuple[float, int], ...]:
    """The part of the growth that a row of `num_tokens` can follow; it never exceeds the row."""
    schedule: list[tuple[float, int]] = []
    for t, length in growth:
        if not schedule or schedule[-1][1] < num_tokens:
            schedule.append((t, min(length, num_tokens)))
    if schedule and schedule[-1][1] != num_tokens:
        raise ConfigError(
            f"--grow: it ends at {schedule[-1][1]} tokens, and a row asks for {num_tokens}; add an "
            f"entry T:{num_tokens}"
        )
    return tuple(schedule)


def refuse_without_effect(weak: int | None, growth: list[tuple[float, int]], longest: int) -> None:
    """Refuse lengths that no row reaches. Raises: ConfigError with all of them."""
    problems = [
        f"--grow: {t:g}:{num_tokens} is never reached by rows of at most {longest} tokens; lower "
        "it, or leave it out"
        for t, num_tokens in growth
        if num_tokens > longest
    ]
    if weak is not None and weak > longest:
        problems.append(
            f"--uncond-num-tokens: {weak} has no effect on rows of at most {longest} tokens; name "
            "fewer, or leave it out"
        )
    if problems:
        raise ConfigError(problems)


def draw_grid(rows: list[np.ndarray], row_names: list[str], columns: list[str]) -> Image.Image:
    """Put images and names on one sheet. Shapes: each row uint8 [B, S, S, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    side = rows[0].shape[1]
    scale = max(1, round(128 / side))
    cell = side * scale
    font = ImageFont.load_default(14)
    left = _MARGIN + max(int(font.getlength(name)) for name in row_names) + _MARGIN
    top = 14 + 2 * _MARGIN
    size = (left + len(columns) * (cell + _MARGIN), top + len(rows) * (cell + _MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        while len(name) > 1 and font.getlength(name) > cell:
            name = name[:-1]
        pen.text((left + column * (cell + _MARGIN), _MARGIN), name, "black", font)
    for row, (images, name) in enumerate(zip(rows, row_names, strict=True)):
        y = top + row * (cell + _MARGIN)
        pen.text((_MARGIN, y + cell // 2 - 7), name, "black", font)
        for column, image in enumerate(images):
            tile = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (cell + _MARGIN), y))
    return sheet


def main() -> int:
    """Load, check everything, and make a grid or many images."""
    args = parse_args(sys.argv[1:])
    out = Path(args.out)
    _check_place(out, many=args.num_images is not None)
    growth = growth_of(args.grow)
    args.bundle = local_bundle(args.bundle)
    check_kind(read_info(args.bundle), args.bundle, *generator_families())
    return _make_many(args, out, growth) if args.num_images else _make_grid(args, out, growth)


def _check_place(out: Path, many: bool) -> None:
    pictures = (".png", ".jpg", ".jpeg", ".webp")
    if many and out.suffix.lower() in (*pictures, ".zip", ".npy"):
        raise ConfigError(
            f"--out: {out} is one file; --num-images writes a folder of PNG files, or ADM's form: "
            f"name a folder, or {out.with_suffix('.npz')}"
        )
    if not many and out.suffix.lower() not in pictures:
        raise ConfigError(f"--out: {out} is no image file; end it in .png, .jpg or .webp")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: {out.parent} is no folder; make it first")


def _make_grid(args: argparse.Namespace, out: Path, growth: list[tuple[float, int]]) -> int:
    from lgm_scale.pipeline import load_pipeline

    pipe = load_pipeline(args.bundle, device=args.device)
    if args.cuda_graphs:
        pipe.replay()
    labels = pipe.class_indices(args.classes or range(min(GRID_CLASSES, pipe.num_classes)))
    lengths = args.num_tokens or [pipe.num_base_tokens]
    refuse_without_effect(args.uncond_num_tokens, growth, max(lengths))
    settings: list[dict[str, Any]] = [
        settings_of(args) | {"length_schedule": schedule_for(growth, k)} for k in lengths
    ]
    for num_tokens, chosen in zip(lengths, settings, strict=True):
        pipe.config(num_tokens, **chosen)  # every row is checked before the first is made
    rows = [
        pipe(labels, num_tokens, seed=args.seed, batch_size=args.batch_size, **chosen)
        for num_tokens, chosen in zip(lengths, settings, strict=True)
    ]
    names = [pipe.classes[label] for label in labels]
    draw_grid(rows, [f"K = {k}" for k in lengths], names).save(out)  # type: ignore[arg-type]  # arrays
    print(f"{out}: {len(labels)} classes at {len(lengths)} lengths")
    return 0


def _make_many(args: argparse.Namespace, out: Path, growth: list[tuple[float, int]]) -> int:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.num_tokens and len(args.num_tokens) > 1:
        raise ConfigError(
            f"--num-tokens: {len(args.num_tokens)} lengths, and --num-images makes images of one; "
            "run once for each, each to its own --out"
        )
    if world > 1 and args.device not in (None, "cpu"):
        raise ConfigError(
            f"--device: {args.device} for {world} ranks, which get a device each; leave it out, "
            "or write cpu"
        )
    with heavy_imports():
        import numpy as np

        from lgm_scale.evaluation.engine.parts import join_ranks
        from lgm_scale.evaluation.sweep.image_set import ImageSet, class_labels
        from lgm_scale.pipeline import load_pipeline

    device = join_ranks()
    pipe = load_pipeline(args.bundle, device=args.device or device)
    if args.cuda_graphs:
        pipe.replay()
    labels = class_labels(pipe, args.classes, args.num_images)
    (num_tokens,) = args.num_tokens or [pipe.num_base_tokens]
    refuse_without_effect(args.uncond_num_tokens, growth, num_tokens)
    schedule = schedule_for(growth, num_tokens)
    chosen: dict[str, Any] = settings_of(args) | {"length_schedule": schedule}
    batch_size = args.batch_size or pipe.batch_size(num_tokens)
    images = ImageSet(
        pipe, out, num_tokens, pipe.config(num_tokens, **chosen), args.seed, labels, batch_size,
        args.chunk_size or ImageSet.chunk_size,
    )  # fmt: skip
    counts = np.bincount(labels)
    each = sorted({int(count) for count in counts if count})
    if os.environ.get("RANK", "0") == "0":
        described = ", ".join(f"{k} {v}" for k, v in images.sampler.settings().items() if v)
        print(
            f"{len(labels):,} images of {np.count_nonzero(counts):,} classes "
            f"({' to '.join(map(str, each[:: max(1, len(each) - 1)]))} each) at K = {num_tokens}, "
            f"seed {args.seed}, {pipe.dtype}; batches of {batch_size} on {world} rank(s)\n"
            f"{described}\n{images.size()}",
            flush=True,
        )
    made = images.make()
    if os.environ.get("RANK", "0") == "0":
        print(f"{out}: {len(labels):,} images, {made:,} of them made now")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
