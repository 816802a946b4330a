"""What a run reads from disk, looked at before the slow imports: data, bundles, files of others.

Each problem is a line `key: value; rule; fix`, to be told together with those of the configuration.
What costs time (hashes of weights) or the network (object storage) is checked when it is opened.
Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from lgm_scale.bundle import INFO_NAME, check_kind, read_info
from lgm_scale.config.schema import TrainingRun
from lgm_scale.data.config import SourceConfig
from lgm_scale.data.manifest import Manifest, check_shards, read_manifest
from lgm_scale.data.mixture import samples_per_source, view_sources
from lgm_scale.data.shards import local_folder
from lgm_scale.errors import LGMError
from lgm_scale.families.base import family_of
from lgm_scale.initial_weights import init_problems
from lgm_scale.storage.clients import is_remote

ToCome = Callable[[str], bool]
"""Whether a path will be made by a job before this one, and so is not looked for."""


def nothing_to_come(path: str) -> bool:
    """Where no job comes before this one."""
    return False


def input_problems(run: TrainingRun, to_come: ToCome = nothing_to_come) -> Iterator[str]:
    """Lines about everything that the run reads and that is not there or does not fit.

    Args:
        run: Its configuration.
        to_come: Which of its inputs will be made before it starts.
    """
    family = family_of(run)
    yield from family.missing_files(run)
    yield from init_problems(run, to_come)
    broken = False
    for key, (folder, kind) in family.bundles(run).items():
        try:
            if not to_come(folder):
                check_kind(read_info(folder), folder, kind)
        except LGMError as error:
            broken = True
            train = f", or make it: composer lgm_scale/train.py CONFIG, with task: {kind} there"
            yield f"{key}: {error}" + ("" if (Path(folder) / INFO_NAME).is_file() else train)
    yield from _watched_problems(run, to_come)
    kind, sources = family.data_kind(run), run.data.sources
    if kind is None or any(is_remote(s.path) or to_come(s.path) for s in sources):
        return
    manifests = []
    for key, source in _keys(run, sources):
        try:
            manifest = read_manifest(source.path, kind)
            check_shards(source.path)
            if not broken and not any(to_come(f) for f, _ in family.bundles(run).values()):
                family.check_data(run, source.path, manifest)
            manifests.append(manifest)
        except LGMError as error:
            yield f"{key}: {error}"
    if not manifests or len(manifests) < len(sources):
        return
    try:
        views, together = view_sources(sources, [local_folder(s) for s in sources], manifests)
        yield from count_problems(run, sum(samples_per_source(sources, views)), together)
    except LGMError as error:
        yield str(error)


def _watched_problems(run: TrainingRun, to_come: ToCome) -> Iterator[str]:
    """Lines about the images on which reconstructions are measured."""
    watched = family_of(run).reconstructions(run)
    if watched is not None and not to_come(watched.images):
        try:
            read_manifest(watched.images, "images")
            check_shards(watched.images)
        except LGMError as error:
            yield f"evaluation.images: {error}"


def _keys(run: TrainingRun, sources: tuple[SourceConfig, ...]) -> list[tuple[str, SourceConfig]]:
    mixture = [(f"data.mixture[{i}].path", source) for i, source in enumerate(run.data.mixture)]
    return mixture if run.data.path is None else [("data.path", sources[0]), *mixture]


def count_problems(run: TrainingRun, found: int, manifest: Manifest) -> Iterator[str]:
    """Lines about samples and classes that are not as many as the configuration says.

    Args:
        run: Its configuration.
        found: Samples of an epoch.
        manifest: What all sources hold together.
    """
    where = " + ".join(source.path for source in run.data.sources)
    wanted, batch = run.data.num_samples, run.train.global_batch_size
    if wanted is not None and found != wanted:
        yield (
            f"data.num_samples: {where} holds {found:,} samples, data.num_samples says "
            f"{wanted:,}: the copy is not complete, or the key is wrong"
        )
    if found < batch:
        yield (
            f"train.global_batch_size: {where} holds {found:,} samples, fewer than one batch of "
            f"{batch:,}: lower train.global_batch_size"
        )
    classes, wanted = manifest.num_classes, family_of(run).num_classes(run)
    if wanted is not None and classes != wanted:
        yield (
            f"model.num_classes: {where} has {classes} classes, model.num_classes says {wanted}: "
            "make them equal"
        )
