"""Many images of one generator at one K: a folder of PNG files, or one npz of ADM's form.

They are made as the samples of a sweep are, in chunks that any number of ranks share. Image i
depends on the seed, i, its class and the sampler alone: not on ranks, batch size or interruptions
(on a GPU a batch of another size may change last bits).

    FOLDER/00000000_class0207.png     image 0, of class 207
    FOLDER/settings.json              what the images depend on
    FOLDER/chunks/                    hashes of finished images: what is not made again
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from PIL import Image

from lgm_scale import __version__
from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.engine.chunks import Bounds, ChunkResult, ChunkStore, Job
from lgm_scale.evaluation.engine.parts import Part, from_rank_zero
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.evaluation.features.extraction import chunk_batches, refuse_broken
from lgm_scale.evaluation.sweep.samples import sample_images, write_npz
from lgm_scale.pipeline import Pipeline
from lgm_scale.sampling.config import SamplerConfig
from lgm_scale.storage.files import digest, file_hash, is_partial, write_json, write_whole

FORMAT = "lgm_scale.images"


def class_labels(pipe: Pipeline, entries: Sequence[str] | None, count: int) -> np.ndarray:
    """Class of each of `count` images, int64 [M].

    Args:
        pipe: The generator, which knows the classes.
        entries: Classes by index or name, in turn: image i has the (i mod number of entries)-th.
            Or `CLASS=COUNT` for each: their images one class after the other. None: all classes
            in turn.
        count: Number of images.

    Raises: ConfigError.
    """
    if entries is None:
        return np.arange(count) % pipe.num_classes
    split = [(entry, "") if entry in pipe.classes else _split(entry) for entry in entries]
    classes = np.array(pipe.class_indices([name for name, _ in split]))
    given = [int(number) for _, number in split if number]
    if not given:
        return classes[np.arange(count) % len(classes)]
    if len(given) < len(split):
        raise ConfigError("--classes: give each class a count (CLASS=COUNT), or none")
    if sum(given) != count:
        raise ConfigError(
            f"--num-images: {count}, and the counts of --classes make {sum(given)}; write "
            f"--num-images {sum(given)}, or other counts"
        )
    return np.repeat(classes, given)


def _split(entry: str) -> tuple[str, str]:
    name, _, number = entry.rpartition("=")
    return (name, number) if number.isdecimal() and name else (entry, "")


@dataclass(frozen=True)
class ImageSet:
    """What is made, and where.

    Args:
        pipe: The generator.
        out: A folder, or a file that ends in .npz.
        labels: Class of each image, int64 [M].
        batch_size: Images at once; no image depends on it.
        chunk_size: Images per piece of work: what an interruption can lose per rank.
    """

    pipe: Pipeline
    out: Path
    num_tokens: int
    sampler: SamplerConfig
    seed: int
    labels: np.ndarray
    batch_size: int
    chunk_size: int = 250

    @property
    def packed(self) -> bool:
        """Whether the result is one npz."""
        return self.out.suffix == ".npz"

    @property
    def work(self) -> Path:
        """Folder of settings and chunks; that of an npz is deleted in the end."""
        return self.out.with_name(f"{self.out.name}.chunks") if self.packed else self.out

    def settings(self) -> dict[str, Any]:
        """What the images depend on, and how they are kept; JSON values."""
        pipe = self.pipe
        described = {name: value for name, value in pipe.info.items() if name != "sampling"}
        settings = {
            "format": FORMAT,
            "lgm_scale": __version__,
            "bundle": digest(described)[:16],
            "num_images": len(self.labels),
            "num_tokens": self.num_tokens,
            **self.sampler.settings(),
            "seed": self.seed,
            "classes": hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()[:16],
            "precision": str(pipe.dtype).removeprefix("torch."),
            "chunk_size": self.chunk_size,
        }
        return json.loads(json.dumps(settings))

    def size(self) -> str:
        """What they need on the disk, as far as it is known."""
        gigabytes = len(self.labels) * 3 * self.pipe.image_size**2 / 1e9
        if self.packed:
            return f"{self.out}: {gigabytes:.3g} GB, and twice that until it is finished"
        return f"{self.out}: at most about {gigabytes:.3g} GB as PNG files"

    def name(self, index: int) -> str:
        """File name of an image."""
        return f"{index:08d}_class{self.labels[index]:04d}.png"

    def make(self) -> int:
        """Make what is missing, with all ranks; return how many images that was.

        Raises: ConfigError if other images are there; DataError if one is not finite.
        """
        problems, finished = from_rank_zero(self._enter)
        if problems:
            raise ConfigError(problems)
        if finished:
            return 0
        engine = Engine(self.work, self.pipe.device)
        if not self.packed:
            engine.chunks = _Pictures(self.work / "chunks", self)
        job = Job("images", self.settings(), len(self.labels), self.chunk_size, self._compute)
        made = engine.make_chunks([job], Part(), f"K = {self.num_tokens}", True)
        if self.packed:
            self._pack(engine, job)
        if engine.first:  # what killed processes were writing
            folder, own = (self.out.parent, self.out.name) if self.packed else (self.out, "")
            for path in folder.glob(f".{own}*"):
                if is_partial(path.name):
                    path.unlink()
        return made

    def _enter(self) -> tuple[list[str], bool]:
        """Claim the place: what is wrong with what is there, and whether it is this, finished."""
        asked, note = self.settings(), self.work / "settings.json"
        finished = self.packed and self.out.exists()
        begun = finished or any(self.work.rglob("*.safetensors")) or any(self.work.glob("*.png"))
        found = _settings_in(self.out if finished else note)
        empty = not self.work.is_dir() or not any(self.work.iterdir())
        if not begun and (empty or found is not None):  # a start that made nothing claims nothing
            write_json(note, asked)
            return [], False
        if found is None:
            return [f"--out: {self.out} holds something else; name another place"], False
        differing = [
            f"{key} is {found.get(key)!r} there and {asked.get(key)!r} here"
            for key in (*asked, *(found.keys() - asked.keys()))
            if found.get(key) != asked.get(key)
        ]
        if differing:
            return [
                f"--out: {self.out} holds images of other settings: {'; '.join(differing)}; give "
                "the same settings to go on, or name another place"
            ], False
        names = {self.name(index) for index in range(len(self.labels))}
        others = sorted({path.name for path in self.work.glob("*.png")} - names)
        if others:
            return [
                f"--out: {self.out} holds {others[0]}, which is none of these images, and would "
                "be taken for one; move it away, or name another place"
            ], False
        if finished:  # a kill may have left the chunks
            shutil.rmtree(self.work, ignore_errors=True)
        return [], finished

    def _compute(self, start: int, stop: int) -> ChunkResult:
        """Make one chunk: pixels [m, S, S, 3] for an npz, else files, and their hashes."""
        labels, images, finite = torch.from_numpy(self.labels), [], []
        for indices in chunk_batches(start, stop, self.batch_size):
            found, good = sample_images(
                self.pipe, indices, self.num_tokens, self.sampler, self.seed, labels=labels[indices]
            )
            images.append(found.permute(0, 2, 3, 1).cpu().numpy())
            finite.append(good.cpu().numpy())
        refuse_broken(np.concatenate(finite), f"images at K = {self.num_tokens}", start)
        pixels = np.concatenate(images)
        if self.packed:
            return ChunkResult({"pixels": pixels})
        hashes = []
        for index, image in enumerate(pixels, start):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            write_whole(self.out / self.name(index), file.getvalue())
            hashes.append(np.frombuffer(hashlib.sha256(file.getvalue()).digest(), np.uint8))
        return ChunkResult({"sha256": np.stack(hashes)})

    def _pack(self, engine: Engine, job: Job) -> None:
        """Write the npz from all chunks, and delete them."""
        if engine.first:
            parts = (engine.chunks.read(job, each).arrays["pixels"] for each in job.bounds)
            comment = json.dumps(self.settings()).encode()
            write_npz(self.out, job.count, parts, self.labels.astype(np.int64), comment)
            shutil.rmtree(self.work)
        dist.barrier()


class _Pictures(ChunkStore):
    """Chunks that are there when the files of their images are, too."""

    def __init__(self, folder: Path, images: ImageSet) -> None:
        super().__init__(folder)
        self.images = images

    def has(self, job: Job, bounds: Bounds) -> bool:
        """Whether the chunk and every image of it are there, whole and undamaged."""
        if not super().has(job, bounds):
            return False
        names = (self.images.name(index) for index in range(*bounds))
        files = [self.images.out / name for name in names]
        hashes = self.read(job, bounds).arrays["sha256"]
        return all(
            path.is_file() and file_hash(path) == expected.tobytes().hex()
            for path, expected in zip(files, hashes, strict=True)
        )


def _settings_in(path: Path) -> dict[str, Any] | None:
    """What the images of an npz or of a settings.json depend on; None if it is none of ours."""
    try:
        if path.suffix != ".npz":
            found = json.loads(path.read_text())
        else:
            with zipfile.ZipFile(path) as archive:
                found = json.loads(archive.comment)
        return found if found["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
