"""How fast data come: decoding and cropping, latents from disk and from S3, and conversion.

    python benchmarks/data.py
    S3_ENDPOINT_URL=... AWS_ACCESS_KEY_ID=... python benchmarks/data.py --remote s3://bucket/folder

Everything per core, in one process where it says so; candidates alternate, so only their ratios
within one run are to be compared. The images are crops of photographs that Python packages ship.
With --remote the latents are stored there first (the folder must be free) and read through an
empty cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features
from torchvision import datasets as vision
from torchvision.transforms import v2

from benchmarks.timing import alternating_medians, print_table
from data_tools.demo_images import DemoArguments, make_demo_images
from lgm_scale.data.config import SourceConfig
from lgm_scale.data.epochs import CheckedLoader
from lgm_scale.data.images import (
    MAX_SCALE,
    ImageDataset,
    center_crop,
    decode_image,
    random_flip,
    random_resized_crop,
)
from lgm_scale.data.manifest import Manifest
from lgm_scale.data.preparation.convert import convert_folder, convert_image, encode_jpeg
from lgm_scale.data.preparation.parts import PartRecord, PartsFolder
from lgm_scale.families.lgm.data import STATS_NAME, TREE_NAME, LatentDataset, LatentStats
from lgm_scale.merging.tree import MergeTree

SIDE = 256
NUM_TOKENS, LATENT_DIM = 256, 32
BATCH = 128
CPU = torch.device("cpu")


def rate_table(
    title: str, what: str, count: int, candidates: dict[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """Print how many per second each candidate makes, and return it."""
    seconds = alternating_medians(candidates, CPU, repeats, warmup=1)
    rates = {name: count / value for name, value in seconds.items()}
    first = next(iter(rates.values()))
    print(f"\n{title}")
    print_table(
        ["", f"{what}/s", "of the first"],
        [[name, f"{rate:,.0f}", f"{rate / first:.2f}"] for name, rate in rates.items()],
    )
    return rates


def image_rates(folder: Path, files: list[Path], repeats: int) -> None:
    """Decoding and loading of 256 px JPEGs, one process."""
    blobs = [path.read_bytes() for path in files]
    numbers = range(len(blobs))

    def loader(train: bool, max_scale: float = MAX_SCALE) -> Callable[[], object]:
        data = ImageDataset(
            folder / "mds",
            image_size=SIDE,
            train=train,
            seed=0,
            batch_size=BATCH,
            max_scale=max_scale,
        )
        return lambda: [data[i] for i in numbers]

    transform = v2.Compose(
        [v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    plain = vision.ImageFolder(str(folder / "photos" / "train"), transform)
    candidates = {
        "bare JPEG decode (Pillow)": lambda: [decode_image(blob) for blob in blobs],
        "ours, evaluation": loader(train=False),
        "ours, training without scaling": loader(train=True, max_scale=1.0),
        "ours, training (scale, crop, flip)": loader(train=True),
        "torchvision ImageFolder, the same kind of crop": lambda: [plain[i] for i in numbers],
    }
    turbo = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
    rate_table(
        f"Images of {SIDE} px, {len(blobs)} files, one process ({turbo} {features.version('jpg')})",
        "images",
        len(blobs),
        candidates,
        repeats,
    )


def image_shares(files: list[Path]) -> None:
    """Where the time of a training image goes."""
    names = ("read", "decode", "scale and crop", "flip", "to tensor")
    seconds = np.zeros(len(names))
    clock = time.perf_counter
    for i, path in enumerate(files):
        rng = np.random.default_rng(i)
        times = [clock()]
        blob = path.read_bytes()
        times.append(clock())
        image = decode_image(blob)
        times.append(clock())
        image = random_resized_crop(image, SIDE, rng)
        times.append(clock())
        image = random_flip(image, rng)
        times.append(clock())
        torch.from_numpy(np.ascontiguousarray(np.array(image).transpose(2, 0, 1)))
        times.append(clock())
        seconds += np.diff(times)
    print("\nShare of a training image's time")
    shares = zip(names, seconds / seconds.sum(), seconds / len(files), strict=True)
    rows = [[name, f"{share:.0%}", f"{each * 1e6:,.0f}"] for name, share, each in shares]
    print_table(["part", "share", "us"], rows)


def write_latents(out: str, staging: str | None, count: int) -> None:
    """A latent data set of random numbers, in shards of 16 MiB."""
    column = f"ndarray:float16:{NUM_TOKENS},{LATENT_DIM}"
    columns = {"latents": column, "latents_flipped": column, "label": "int"}
    per_part = 512
    parts = -(-count // per_part)
    work = PartsFolder(out, staging, "latents", {"command": "benchmark", "count": count}, parts)
    if work.already_finished() is not None:
        return
    work.open()
    rng = np.random.default_rng(0)
    for part in range(parts):
        size = min(per_part, count - part * per_part)
        values = rng.standard_normal((size, NUM_TOKENS, LATENT_DIM)).astype(np.float16)
        samples = ({"latents": v, "latents_flipped": v, "label": 0} for v in values)
        work.write(part, columns, samples, lambda size=size: PartRecord([0] * size, {}))
    extra = {"num_base_tokens": NUM_TOKENS, "latent_dim": LATENT_DIM, "tokenizer_id": "none"}
    extra["made_from"] = work.made_from
    manifest = Manifest("latents", count, ("all",), (count,), SIDE, extra)
    stats = LatentStats(torch.zeros(LATENT_DIM), torch.ones(LATENT_DIM))
    generator = torch.Generator().manual_seed(0)
    tree = MergeTree.from_embeddings(torch.randn(NUM_TOKENS, 8, generator=generator))
    work.join(manifest, work.records(), {STATS_NAME: stats.save, TREE_NAME: tree.save})


def read_epoch(source: SourceConfig, workers: int) -> float:
    """Samples per second of a whole epoch through the loader, its start included."""
    data = LatentDataset(
        (source,),
        shuffle=True,
        seed=0,
        batch_size=BATCH,
        num_base_tokens=NUM_TOKENS,
        latent_dim=LATENT_DIM,
        tokenizer_id=None,
    )
    loader = CheckedLoader(data, batch_size=BATCH, num_workers=workers)
    start = time.perf_counter()
    count = sum(len(batch["labels"]) for batch in loader)
    return count / (time.perf_counter() - start)


def latent_rates(folder: Path, count: int, remote: str | None, repeats: int) -> None:
    """Latents of 256 x 32 through the loader."""
    write_latents(str(folder / "latents"), None, count)
    local = SourceConfig(path=str(folder / "latents"))
    rows: dict[str, list[float]] = {}
    for _ in range(repeats):
        for workers in (0, 1, 2):
            name = f"local, {workers} workers" if workers else "local, in the main process"
            rows.setdefault(name, []).append(read_epoch(local, workers))
    if remote is not None:
        write_latents(remote, str(folder / "staging"), count)
        for i in range(repeats):
            cache = SourceConfig(path=remote, cache=str(folder / f"cache{i}"))
            rows.setdefault("S3, empty cache, 2 workers", []).append(read_epoch(cache, 2))
            rows.setdefault("S3, full cache, 2 workers", []).append(read_epoch(cache, 2))
    size = 2 * 2 * NUM_TOKENS * LATENT_DIM
    print(f"\nLatents, {NUM_TOKENS} x {LATENT_DIM}, both flips stored: {size:,} bytes a sample")
    print_table(
        ["from", "samples/s", "MB/s read"],
        [
            [name, f"{np.median(v):,.0f}", f"{np.median(v) * size / 1e6:,.0f}"]
            for name, v in rows.items()
        ],
    )


def conversion_rates(folder: Path, repeats: int) -> None:
    """Conversion of photographs of 500 x 375, one process."""
    source = folder / "large" / "photo"
    source.mkdir(parents=True)
    photos = sorted((folder / "photos" / "train").rglob("*.jpg"))[::3][:120]
    for i, path in enumerate(photos):
        with Image.open(path) as image:
            image.resize((500, 375), Image.Resampling.BICUBIC).save(source / f"{i:04}.jpg")
    blobs = [path.read_bytes() for path in sorted(source.iterdir())]
    made = iter(range(10**6))

    def convert(size: int | None) -> Callable[[], object]:
        def run() -> None:
            convert_folder(source.parent, folder / f"made{next(made)}", size)

        return run

    decoded = [decode_image(blob) for blob in blobs]
    cropped = [center_crop(image, SIDE) for image in decoded]
    rate_table(
        f"Conversion of 500 x 375 JPEGs, {len(blobs)} files, one process",
        "images",
        len(blobs),
        {
            "bare JPEG decode (Pillow)": lambda: [decode_image(blob) for blob in blobs],
            "bytes kept": convert(None),
            f"--image-size {SIDE}": convert(SIDE),
            "its decode, crop and encode without files": lambda: [
                convert_image(blob, "", SIDE) for blob in blobs
            ],
            "centre crop alone": lambda: [center_crop(image, SIDE) for image in decoded],
            "JPEG encode alone": lambda: [encode_jpeg(image) for image in cropped],
        },
        repeats,
    )


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--remote", metavar="s3://...", help="free place for 200 MB of latents")
    parser.add_argument("--latents", type=int, default=6144, help="samples (default: 6144)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lgm_scale-data-") as name:
        folder = Path(name)
        make_demo_images(folder / "photos", DemoArguments(SIDE, 24, 1, 0))
        convert_folder(folder / "photos" / "train", folder / "mds")
        files = sorted((folder / "photos" / "train").rglob("*.jpg"))
        image_rates(folder, files, args.repeats)
        image_shares(files)
        conversion_rates(folder, args.repeats)
        latent_rates(folder, args.latents, args.remote, args.repeats)


if __name__ == "__main__":
    main()
