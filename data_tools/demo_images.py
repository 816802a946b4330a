"""Make a small ImageFolder from photographs that installed Python packages ship.

17 photographs, one class each; an image is a crop of random place and scale. Nothing is
downloaded. Training and validation crops come from disjoint parts of each photograph.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lgm_scale  # noqa: F401  # says so where Python is a wrong one

# isort: split
import numpy as np
from PIL import Image
from tqdm import tqdm

from lgm_scale.data.manifest import written_aside
from lgm_scale.errors import ConfigError, DataError, MissingAssetError, exit_on_user_error

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

INFO_NAME = "dataset.json"
VAL_FRACTION = 0.36  # of the side that is cut
MAX_SIDE_FRACTION = 0.8  # of the longest crop that fits, so that crops differ
JPEG_QUALITY = 95
MIN_SIZE = 16
MAX_PER_CLASS = 100_000  # five digits in a file name


@dataclass(frozen=True)
class Photograph:
    """A photograph inside an installed package.

    Args:
        val_side: Side of it that is for validation ("left", "right" or "bottom"), chosen so that
            both parts show the subject.
        window: Useful part (left, top, right, bottom) as fractions, without black borders.
    """

    name: str
    package: str
    path: str
    val_side: str = "right"
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "data/astronaut.png", "bottom"),
    Photograph("brick", "skimage", "data/brick.png"),
    Photograph("camera", "skimage", "data/camera.png", "bottom"),
    Photograph("chelsea", "skimage", "data/chelsea.png", "left"),
    Photograph("china", "sklearn", "datasets/images/china.jpg", "bottom"),
    Photograph("coffee", "skimage", "data/coffee.png"),
    Photograph("coins", "skimage", "data/coins.png"),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg", "bottom", (0.1, 0.0, 0.85, 1.0)),
    Photograph("grace_hopper", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "bottom"),
    Photograph("grass", "skimage", "data/grass.png"),
    Photograph("gravel", "skimage", "data/gravel.png"),
    Photograph("hubble_deep_field", "skimage", "data/hubble_deep_field.jpg"),
    Photograph("immunohistochemistry", "skimage", "data/ihc.png"),
    Photograph("moon", "skimage", "data/moon.png"),
    Photograph("motorcycle", "skimage", "data/motorcycle_left.png"),
    Photograph("retina", "skimage", "data/retina.jpg", "right", (0.17, 0.17, 0.83, 0.83)),
    Photograph("rocket", "skimage", "data/rocket.jpg", "bottom", (0.0, 0.15, 1.0, 1.0)),
)


@dataclass(frozen=True)
class Regions:
    """Where the crops of one photograph come from, in pixels of the photograph."""

    train: Box
    val: Box
    disjoint: bool


def find_photograph(photograph: Photograph) -> Path:
    """Locate a photograph without importing its package.

    Raises: MissingAssetError if the package or the file is not installed.
    """
    spec = importlib.util.find_spec(photograph.package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / photograph.path
        if path.is_file():
            return path
    raise MissingAssetError(
        f"{photograph.package}/{photograph.path} (class {photograph.name!r}) is not installed: it "
        "comes with the pinned versions of scikit-image, scikit-learn and matplotlib. "
        "Install them with: pip install -e ."
    )


def split_regions(size: tuple[int, int], photograph: Photograph, image_size: int) -> Regions:
    """Cut a photograph into a training and a validation part, next to each other.

    Where a part would be smaller than `image_size`, both parts are the whole photograph.

    Raises: ConfigError if the photograph is smaller than `image_size`.
    """
    box = [round(part * side) for part, side in zip(photograph.window, 2 * size, strict=True)]
    shortest = min(box[2] - box[0], box[3] - box[1])
    if shortest < image_size:
        raise ConfigError(
            f"--image-size {image_size} is larger than photograph {photograph.name!r} "
            f"({box[2] - box[0]} x {box[3] - box[1]}): choose at most {shortest}"
        )
    low, high = (1, 3) if photograph.val_side == "bottom" else (0, 2)  # the ends of the cut side
    length = box[high] - box[low]
    cut = max(round(length * VAL_FRACTION), image_size)
    first, second = list(box), list(box)
    if length - cut < image_size:
        return Regions(_box(box), _box(box), disjoint=False)
    first_is_val = photograph.val_side == "left"
    first[high] = second[low] = box[low] + cut if first_is_val else box[high] - cut
    train, val = (second, first) if first_is_val else (first, second)
    return Regions(_box(train), _box(val), disjoint=True)


def _box(ends: list[int]) -> Box:
    left, top, right, bottom = ends
    return (left, top, right, bottom)


def draw_box(region: Box, image_size: int, rng: np.random.Generator) -> Box:
    """Draw a square inside `region`: log-uniform side from `image_size` up, uniform place."""
    left, top, right, bottom = region
    fits = min(right - left, bottom - top)
    longest = max(image_size, int(fits * MAX_SIDE_FRACTION))
    side = round(float(np.exp(rng.uniform(np.log(image_size), np.log(longest)))))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(top, bottom - side + 1))
    return (x, y, x + side, y + side)


@dataclass(frozen=True)
class DemoArguments:
    """What determines the files, byte for byte."""

    image_size: int = 64
    train_per_class: int = 256
    val_per_class: int = 32
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for impossible values, all at once."""
        problems = []
        if self.image_size < MIN_SIZE:
            problems.append(f"--image-size is {self.image_size}: at least {MIN_SIZE} is needed")
        for key in ("train_per_class", "val_per_class"):
            value = getattr(self, key)
            if not 1 <= value <= MAX_PER_CLASS:
                option = f"--{key.replace('_', '-')}"
                problems.append(f"{option} is {value}: it must be 1 to {MAX_PER_CLASS}")
        if self.seed < 0:
            problems.append(f"--seed is {self.seed}: it must not be negative")
        if problems:
            raise ConfigError(problems)


def make_demo_images(folder: Path, arguments: DemoArguments) -> str:
    """Write the data set into `folder`, unless it is there already.

    Returns: one line to show to the user.
    Raises: DataError if `folder` holds something else; MissingAssetError; ConfigError.
    """
    arguments.check()
    if _is_finished(folder, arguments):
        return f"{folder} is already there, made with the same arguments: nothing to do"
    sources = [(photograph, find_photograph(photograph)) for photograph in PHOTOGRAPHS]
    counts = {"train": arguments.train_per_class, "val": arguments.val_per_class}
    classes = {}
    with (
        written_aside(folder, ("train", "val", INFO_NAME), "demo_images") as aside,
        tqdm(
            total=len(sources) * sum(counts.values()), unit="image", desc="demo images"
        ) as progress,
    ):
        for label, (photograph, path) in enumerate(sources):
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            regions = split_regions(image.size, photograph, arguments.image_size)
            splits = (("train", regions.train), ("val", regions.val))
            for split_id, (split, region) in enumerate(splits):
                target = aside / split / photograph.name
                target.mkdir(parents=True)
                for index in range(counts[split]):
                    key = [arguments.seed, label, split_id, index]  # the crop depends on it alone
                    crop = draw_crop(image, region, arguments.image_size, key)
                    crop.save(target / f"{index:05d}.jpg", quality=JPEG_QUALITY, subsampling=0)
                    progress.update()
            source = f"{photograph.package}/{photograph.path}"
            classes[photograph.name] = {"source": source, "size": image.size, **asdict(regions)}
        document = {"arguments": asdict(arguments), "classes": classes}
        (aside / INFO_NAME).write_text(json.dumps(document, indent=1) + "\n")
    shared = [name for name, values in classes.items() if not values["disjoint"]]
    note = f"; train and val overlap (photograph too small): {', '.join(shared)}" if shared else ""
    return (
        f"{folder}: {len(sources)} classes, {len(sources) * arguments.train_per_class} train and "
        f"{len(sources) * arguments.val_per_class} val images of "
        f"{arguments.image_size} x {arguments.image_size}{note}"
    )


def draw_crop(image: Image.Image, region: Box, size: int, key: list[int]) -> Image.Image:
    """Cut a random square out of a region of a photograph, scaled to `size` pixels a side."""
    crop = image.crop(draw_box(region, size, np.random.default_rng(key)))
    return crop.resize((size, size), Image.Resampling.BICUBIC)  # Pillow's is antialiased


def _is_finished(folder: Path, arguments: DemoArguments) -> bool:
    """Whether `folder` holds this data set. DataError if it was made with other arguments."""
    path = folder / INFO_NAME
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text())["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): delete {folder} and run again") from error
    if found == asdict(arguments):
        return True
    raise DataError(
        f"{folder} was made with other arguments ({found}, not {asdict(arguments)}): it is never "
        "overwritten. Choose another --out, or delete it."
    )


def main() -> None:
    """Parse the command line and make the data set."""
    defaults = DemoArguments()
    parser = argparse.ArgumentParser(
        prog="python data_tools/demo_images.py",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make, with train/ and val/ inside")
    add("--image-size", type=int, default=defaults.image_size, help="side of the images in pixels")
    add("--train-per-class", type=int, default=defaults.train_per_class, help="training crops")
    add("--val-per-class", type=int, default=defaults.val_per_class, help="validation crops")
    add("--seed", type=int, default=defaults.seed, help="same seed, same files byte for byte")
    options = vars(parser.parse_args())
    folder = options.pop("out")
    print(make_demo_images(folder, DemoArguments(**options)))


if __name__ == "__main__":
    exit_on_user_error(main)
