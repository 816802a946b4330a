"""Make a reference of images, of a file of statistics, or of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lgm_scale import __version__
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.evaluation.engine.chunks import Job
from lgm_scale.evaluation.engine.parts import Part, join_ranks
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.evaluation.features.extraction import OriginalFeatures
from lgm_scale.evaluation.features.spaces import Spaces
from lgm_scale.evaluation.images import npz_images_shape, open_source, spread
from lgm_scale.evaluation.references.files import Reference, load_reference

__all__ = ["ReferenceOptions", "make_reference"]

STATISTICS = ("inception_pool", "inception_spatial", "dinov2")
FEATURES = ("inception_pool",)
"""Kept vector by vector: what KID, precision and recall read."""


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What a reference is made of, and how.

    Args:
        source: Folder of images, MDS shards, `.npz` or `.pkl`.
        work: Folder of unfinished work.
        inception: File of Inception's weights.
        dinov2: File of DINOv2's weights.
        image_size: Pixels along a side, for a folder of images.
        keep_features: Images whose features are kept, evenly spaced.
        name: Of the reference in results; None: that of the source.
        batch_size: Images at once.
        chunk_size: Images per file of unfinished work.
    """

    source: Path
    work: Path
    inception: str | None = None
    dinov2: str | None = None
    image_size: int | None = None
    keep_features: int = 10_000
    name: str | None = None
    batch_size: int = 50
    chunk_size: int = 250


def make_reference(options: ReferenceOptions) -> Reference:
    """Make a reference; the same one on every rank.

    Statistics that a file holds are kept as they are: published numbers speak of them. Its images
    add what it lacks, if a network's weights are given.

    Raises: ConfigError, DataError, CheckpointError.
    """
    path = options.source
    known = Reference(name=options.name or path.stem)
    has_images = path.suffix not in (".npz", ".pkl")
    if not has_images:
        has_images = path.suffix == ".npz" and path.is_file() and npz_images_shape(path) is not None
        try:
            known = load_reference(path)
        except DataError:
            if not has_images:  # an npz of samples, say, has no statistics: its images will do
                raise
    if has_images and (options.inception or options.dinov2):
        return _with_images(options, known)
    if not known.statistics:
        raise ConfigError(
            f"--inception: missing, and so is --dinov2; {path} holds images and no "
            "statistics, so a network must look at them"
        )
    return known


def _with_images(options: ReferenceOptions, known: Reference) -> Reference:
    device = join_ranks()
    source, identity = open_source(options.source, options.image_size)
    if len(source) < 2:
        raise DataError(f"{options.source} holds {len(source)} images; needs 2 or more")
    spaces = Spaces.load(device, inception=options.inception, dinov2=options.dinov2)
    protocol = {
        "kind": "images",
        "lgm_scale": __version__,
        "images": identity,
        "features": spaces.describe(),
    }
    compute = OriginalFeatures(source, spaces.all, device, options.batch_size)
    job = Job("reference", protocol, len(source), options.chunk_size, compute)
    engine = Engine(options.work, device)
    engine.make_chunks([job], Part(), "reference", may_compute=True)
    features = tuple(name for name in STATISTICS if name in spaces.outputs)
    engine.make_sums([(job, features)])
    kept = np.array(spread(len(source), options.keep_features))
    names = [name for name in FEATURES if name in spaces.outputs] if len(kept) else []
    return replace(
        known,
        name=options.name or known.name,
        statistics=engine.statistics(job, features) | known.statistics,
        features={name: engine.features(job, [name])[name][kept] for name in names},
        image_size=identity["image_size"],
        weights={space["space"]: space["weights_sha256"] for space in spaces.describe()},
        description=known.description
        | {
            "images": identity,
            "num_images": len(source),
            "num_features": len(kept) if names else 0,
            "measured_here": sorted(set(features) - known.statistics.keys()),
            "features": spaces.describe(),
        },
    )
