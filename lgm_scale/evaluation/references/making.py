"""Make a reference of images, of a file of statistics, or of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lgm_scale import __version__
from lgm_scale.data.fashion_mnist import IMAGE_SIZE
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.evaluation.engine.chunks import Job
from lgm_scale.evaluation.engine.parts import Part, join_ranks
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.evaluation.features.extraction import OriginalFeatures
from lgm_scale.evaluation.features.spaces import Spaces
from lgm_scale.evaluation.images import npz_images_shape, open_source, spread
from lgm_scale.evaluation.references.files import Reference, load_reference

STATISTICS = ("inception_pool", "inception_spatial", "dinov2", "fashion_pool")
FEATURES = ("inception_pool", "fashion_pool")
"""Kept vector by vector: what KID, precision and recall read."""


def make_reference(
    source: Path,
    work: Path,
    *,
    inception: str | None = None,
    dinov2: str | None = None,
    fashion_mnist: bool = False,
    image_size: int | None = None,
    keep_features: int = 10_000,
    name: str | None = None,
    batch_size: int = 50,
    chunk_size: int = 250,
) -> Reference:
    """Make a reference; the same one on every rank.

    Statistics that a file holds are kept as they are: published numbers speak of them. Its images
    add what it lacks, if a network's weights are given.

    `source` is a folder of images (only this one needs `image_size`), MDS shards, `.npz` or `.pkl`,
    and `work` a folder of unfinished work. The features of `keep_features` images are kept, evenly
    spaced. Results call the reference `name`; None: as the source.
    With `fashion_mnist`, the classifier of Fashion-MNIST looks at the images.

    Raises: ConfigError, DataError, CheckpointError.
    """
    known = Reference(name=name or source.stem)
    has_images = source.suffix not in (".npz", ".pkl")
    if not has_images:
        has_images = (
            source.suffix == ".npz" and source.is_file() and npz_images_shape(source) is not None
        )
        try:
            known = load_reference(source)
        except DataError:
            if not has_images:  # an npz of samples, say, has no statistics: its images will do
                raise
    if not has_images or not (inception or dinov2 or fashion_mnist):
        if not known.statistics:
            raise ConfigError(
                f"--inception: missing, and so is --dinov2; {source} holds images and no "
                "statistics, so a network must look at them"
            )
        return known
    device = join_ranks()
    images, identity = open_source(source, image_size)
    if len(images) < 2:
        raise DataError(f"{source} holds {len(images)} images; needs 2 or more")
    if fashion_mnist and identity["image_size"] != IMAGE_SIZE:
        raise ConfigError(
            f"--fashion-mnist: {source} holds images of {identity['image_size']} pixels; its "
            f"classifier looks at {IMAGE_SIZE}: drop the option, or give Fashion-MNIST's images"
        )
    spaces = Spaces.load(device, inception=inception, dinov2=dinov2, fashion_mnist=fashion_mnist)
    protocol = {
        "kind": "images",
        "lgm_scale": __version__,
        "images": identity,
        "features": spaces.describe(),
    }
    originals = OriginalFeatures(images, spaces.all, device, batch_size)
    job = Job("reference", protocol, len(images), chunk_size, originals)
    engine = Engine(work, device)
    engine.make_chunks([job], Part(), "reference", may_compute=True)
    measured = tuple(feature for feature in STATISTICS if feature in spaces.outputs)
    engine.make_sums([(job, measured)])
    kept = np.array(spread(len(images), keep_features))
    names = [feature for feature in FEATURES if feature in spaces.outputs and len(kept)]
    return Reference(
        name=name or known.name,
        statistics=engine.statistics(job, measured) | known.statistics,
        features={feature: engine.features(job, [feature])[feature][kept] for feature in names},
        image_size=identity["image_size"],
        weights={space["space"]: space["weights_sha256"] for space in spaces.describe()},
        description=known.description
        | {
            "images": identity,
            "num_images": len(images),
            "num_features": len(kept) if names else 0,
            "measured_here": sorted(set(measured) - known.statistics.keys()),
            "features": spaces.describe(),
        },
    )
