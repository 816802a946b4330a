"""How fast data come: decoding and cropping, latents from disk and from S3, and conversion.

    python -m benchmarks.data
    S3_ENDPOINT_URL=... AWS_ACCESS_KEY_ID=... python -m benchmarks.data --remote s3://bucket/folder

Images and latents per second that a core works, workers included; candidates alternate, so only
their ratios within one run are to be compared. The images are crops of photographs that Python
packages ship. With --remote the latents are stored there first (the folder must be free) and read
through an empty cache.
"""

from __future__ import annotations

import itertools
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate
from torchvision import datasets as vision
from torchvision.transforms import v2

from benchmarks.harness import command_line, print_rates, print_table
from data_tools.demo_images import DemoArguments, make_demo_images
from lgm_scale.data.config import SourceConfig
from lgm_scale.data.decoding import (
    MAX_SCALE,
    center_crop,
    decode_image,
    draw_crop,
    random_resized_crop,
)
from lgm_scale.data.epochs import CheckedLoader
from lgm_scale.data.images import ImageDataset, planes
from lgm_scale.data.manifest import Manifest
from lgm_scale.data.preparation.convert import convert_folder, convert_image, encode_jpeg
from lgm_scale.data.preparation.parts import PartRecord, PartsFolder
from lgm_scale.data.scaling import DeviceCrop, cut_window
from lgm_scale.families.lgm.data import LGMLatentDataset
from lgm_scale.families.lgm.latent_stats import STATS_NAME, LatentStats
from lgm_scale.merging.tree import TREE_NAME, MergeTree

SIDE = 256
NUM_TOKENS, LATENT_DIM = 256, 32
BATCH = 128


def torch_scaled(blob: bytes, seed: int) -> Tensor:
    """A training image scaled by torch's filter for uint8, whose bits are not Pillow's."""
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(np.array(decode_image(blob))).permute(2, 0, 1)[None]
    side = int(rng.integers(SIDE, int(SIDE * MAX_SCALE) + 1))
    left, top = rng.integers(side - SIDE + 1, size=2)
    scaled = interpolate(pixels, size=side, mode="bicubic", antialias=True)[0]
    scaled = scaled[:, top : top + SIDE, left : left + SIDE]
    return (scaled.flip(2) if rng.random() < 0.5 else scaled).contiguous()


def image_rates(folder: Path, files: list[Path], repeats: int) -> None:
    """Decoding and loading of 256 px JPEGs, one process."""
    blobs = [path.read_bytes() for path in files]
    made_like = partial(ImageDataset, folder / "mds", image_size=SIDE, seed=0, batch_size=BATCH)
    transform = v2.Compose(
        [v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    read = {
        "ours, evaluation": made_like(train=False),
        "ours, training without scaling": made_like(train=True, max_scale=1.0),
        "ours, training (scale, crop, flip)": made_like(train=True),
        "ours, training, a worker's part of it (crop_on: device)": made_like(
            train=True, crop_on="device"
        ),
        "torchvision ImageFolder, the same kind of crop": vision.ImageFolder(
            str(folder / "photos" / "train"), transform
        ),
    }
    candidates: dict[str, Callable[[], object]] = {
        "bare JPEG decode (Pillow)": lambda: [decode_image(blob) for blob in blobs]
    }
    for name, data in read.items():
        candidates[name] = lambda data=data: [data[i] for i in range(len(blobs))]
    candidates["training, scaled by torch (other bits), no data set"] = lambda: [
        torch_scaled(blob, i) for i, blob in enumerate(blobs)
    ]
    turbo = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
    title = f"Images of {SIDE} px, {len(blobs)} files, per core-second"
    title += f" ({turbo} {features.version('jpg')})"
    print_rates(title, "images", len(blobs), candidates, repeats, clock=time.process_time)


def image_shares(files: list[Path]) -> None:
    """Where the time of a training image goes, with crops made by the worker and by the device."""
    parts: dict[str, dict[str, Any]] = {
        "workers": {
            "read": lambda path, rng: path.read_bytes(),
            "decode": lambda data, rng: decode_image(data),
            "draw, scale and crop": lambda image, rng: random_resized_crop(image, SIDE, rng),
            "to tensor": lambda image, rng: planes(image),
            "flip": lambda pixels, rng: pixels.flip(2),
        },
        "device": {
            "read": lambda path, rng: path.read_bytes(),
            "decode": lambda data, rng: decode_image(data),
            "draw": lambda image, rng: draw_crop(image, SIDE, rng),
            "pixels and place": lambda crop, rng: cut_window(crop, True, SIDE, SIDE, ""),
        },
    }
    for crop_on, works in parts.items():
        seconds: dict[str, float] = {}
        for i, path in enumerate(files):
            rng = np.random.default_rng(i)
            value: Any = path
            for part, work in works.items():
                start = time.process_time()
                value = work(value, rng)
                seconds[part] = seconds.get(part, 0.0) + time.process_time() - start
        total = sum(seconds.values())
        print(f"\nShare of a training image's time in a worker, crop_on: {crop_on}")
        rows = [(part, each / total, each / len(files) * 1e6) for part, each in seconds.items()]
        print_table({"part": "", "share": ".0%", "us": ",.0f"}, rows)


def device_part(folder: Path, repeats: int) -> None:
    """What `crop_on: device` leaves to the device: a GPU, or where there is none, a core."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: Any = {"seed": 0, "batch_size": BATCH, "crop_on": "device"}
    data = ImageDataset(folder / "mds", image_size=SIDE, train=True, **options)
    finish, count = DeviceCrop(SIDE, SIDE), 16 if device.type == "cpu" else BATCH
    batch = default_collate([data[i] for i in range(count)])
    batch = {name: value.to(device) for name, value in batch.items()}
    operations = 2 * 3 * SIDE**2 * finish.num_taps / 1e6
    title = f"The device's part, {count} images on {device}, by the clock on the wall: "
    title += f"{operations:.1f} M integer multiply-adds an image"
    work: dict[str, Callable[[], object]] = {"scale, cut, flip": lambda: finish(batch)}
    print_rates(title, "images", count, work, repeats, device)


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


def core_seconds() -> float:
    """Processor time of this process and of its children that have ended, to the microsecond."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def read_epoch(source: SourceConfig, workers: int) -> tuple[float, float]:
    """Samples of a whole epoch through the loader, its start included: per second, per core's."""
    data = LGMLatentDataset(
        (source,),
        shuffle=True,
        seed=0,
        batch_size=BATCH,
        num_base_tokens=NUM_TOKENS,
        latent_dim=LATENT_DIM,
        tokenizer_id=None,
    )
    loader = CheckedLoader(data, batch_size=BATCH, num_workers=workers)
    start, cores = time.perf_counter(), core_seconds()
    count = sum(len(batch["labels"]) for batch in loader)
    return count / (time.perf_counter() - start), count / (core_seconds() - cores)


def read_bare(folder: Path) -> tuple[float, float]:
    """The floor of `read_epoch`: shards read whole, one flip of each sample, stacked in batches."""
    start, cores, count = time.perf_counter(), core_seconds(), 0
    for path in sorted(folder.glob("shard.*.mds")):
        data = path.read_bytes()
        num = int(np.frombuffer(data, np.uint32, 1)[0])
        offsets = np.frombuffer(data, np.uint32, num, 4)
        size = NUM_TOKENS * LATENT_DIM
        rows = [np.frombuffer(data, np.float16, size, at) for at in offsets]
        for first in range(0, num, BATCH):
            torch.from_numpy(np.stack(rows[first : first + BATCH]))
        count += num
    return count / (time.perf_counter() - start), count / (core_seconds() - cores)


def latent_rates(folder: Path, count: int, remote: str | None, repeats: int) -> None:
    """Latents of 256 x 32 through the loader."""
    write_latents(str(folder / "latents"), None, count)
    local = SourceConfig(path=str(folder / "latents"))
    rows: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        rows.setdefault("bare reading of shards", []).append(read_bare(folder / "latents"))
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
        {"from": "", "samples/s": ",.0f", "samples per core-second": ",.0f"},
        [(name, *np.median(values, 0)) for name, values in rows.items()],
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
    made = itertools.count()

    def convert(size: int | None) -> None:
        convert_folder(source.parent, folder / f"made{next(made)}", size)

    decoded = [decode_image(blob) for blob in blobs]
    cropped = [center_crop(image, SIDE) for image in decoded]
    candidates: dict[str, Callable[[], object]] = {
        "bare JPEG decode (Pillow)": lambda: [decode_image(blob) for blob in blobs],
        "bytes kept": lambda: convert(None),
        f"--image-size {SIDE}": lambda: convert(SIDE),
        "its decode, crop and encode without files": lambda: [
            convert_image(blob, "", SIDE) for blob in blobs
        ],
        "centre crop alone": lambda: [center_crop(image, SIDE) for image in decoded],
        "JPEG encode alone": lambda: [encode_jpeg(image) for image in cropped],
    }
    title = f"Conversion of 500 x 375 JPEGs, {len(blobs)} files, one process"
    print_rates(title, "images", len(blobs), candidates, repeats)
    convert(None)
    kept = folder / f"made{next(made) - 1}"
    options: Any = {"image_size": SIDE, "train": True, "seed": 0, "batch_size": BATCH}
    rates = {"bare JPEG decode (Pillow)": candidates["bare JPEG decode (Pillow)"]}
    for where in ("workers", "device"):
        data = ImageDataset(kept, crop_on=where, **options)
        rates[f"ours, training, crop_on: {where}"] = lambda data=data: [
            data[i] for i in range(len(blobs))
        ]
    title = f"Images of 500 x 375, {len(blobs)} files, a worker's part per core-second"
    print_rates(title, "images", len(blobs), rates, repeats, clock=time.process_time)


def main() -> None:
    """Parse the command line and measure."""
    parser = command_line("data", __doc__, repeats=5)
    parser.add_argument("--remote", metavar="s3://...", help="free place for 200 MB of latents")
    parser.add_argument("--latents", type=int, default=6144, help="samples (default: 6144)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lgm_scale-data-") as name:
        folder = Path(name)
        make_demo_images(folder / "photos", DemoArguments(SIDE, 24, 1, 0))
        convert_folder(folder / "photos" / "train", folder / "mds")
        files = sorted((folder / "photos" / "train").rglob("*.jpg"))
        image_rates(folder, files, args.repeats)
        image_shares(files)
        device_part(folder, args.repeats)
        conversion_rates(folder, args.repeats)
        latent_rates(folder, args.latents, args.remote, args.repeats)


if __name__ == "__main__":
    main()
