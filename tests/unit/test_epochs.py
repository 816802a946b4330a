"""Epochs: the same order on every machine, whole, with the right classes, or an error."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.dataset import _ShardState
from streaming.base.shared import prefix as shared_prefix
from streaming.base.world import World
from test_images import dataset_of, write_images
from torch.utils.data import DataLoader

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.epochs import CheckedLoader, EpochDataset, StreamOptions
from lgm_scale.data.manifest import LABELS_NAME, Manifest, write_manifest
from lgm_scale.errors import DataError
from lgm_scale.storage.transfer import Patience

NUM_SAMPLES = 101  # no multiple of anything
GLOBAL_BATCH = 12


def write_labels(
    folder: Path, labels: list[int], classes: tuple[str, ...], shard_bytes: int = 600
) -> Path:
    """A folder that says it holds images; their bytes are the sample's number."""
    with MDSWriter(
        out=str(folder), columns={"image": "bytes", "label": "int"}, size_limit=shard_bytes
    ) as writer:
        for i, label in enumerate(labels):
            writer.write({"image": str(i).encode(), "label": label})
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    np.save(folder / LABELS_NAME, np.asarray(labels, np.int32))
    write_manifest(folder, Manifest("images", len(labels), classes, tuple(counts)))
    return folder


def epochs_of(*sources: SourceConfig | Path, **changes) -> EpochDataset:
    given = [s if isinstance(s, SourceConfig) else SourceConfig(path=str(s)) for s in sources]
    values = {"shuffle": True, "seed": 5, "batch_size": 4, **changes}
    return EpochDataset(given, "images", **values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    labels = [i % 4 for i in range(NUM_SAMPLES)]
    return write_labels(tmp_path_factory.mktemp("mds") / "data", labels, ("a", "b", "c", "d"))


# Order


def global_batches(dataset, nodes, ranks, workers, epoch, begun, initial_nodes=1) -> list[list]:
    """Samples of each global batch on a machine of that shape, as the library deals them out."""
    world = World(nodes, ranks, workers, 0)
    dataset.batch_size = GLOBAL_BATCH // (nodes * ranks)
    dataset.initial_physical_nodes = initial_nodes
    dataset.num_canonical_nodes = 1
    dataset._set_shuffle_block_size(world)
    work = generate_work("random", dataset, world, epoch, begun)
    batches = []
    for index in range((NUM_SAMPLES - begun) // GLOBAL_BATCH):
        deal = work[:, :, index % workers, index // workers]  # [nodes, ranks, batch]
        batches.append(sorted(deal.flatten().tolist()))
    return batches


SHAPES = [(1, 1, 1), (1, 1, 3), (1, 2, 2), (1, 3, 1), (2, 1, 2), (2, 2, 1), (2, 3, 2), (3, 4, 1)]


@pytest.mark.parametrize("epoch", [0, 1])
def test_global_batches_do_not_depend_on_nodes_ranks_or_workers(folder, epoch):
    dataset = epochs_of(folder)
    whole = global_batches(dataset, 1, 1, 1, epoch, 0)
    ids = list(itertools.chain(*whole))
    assert len(ids) == len(set(ids)) == NUM_SAMPLES // GLOBAL_BATCH * GLOBAL_BATCH
    for shape in SHAPES:
        assert global_batches(dataset, *shape, epoch, 0) == whole, shape
    # Resumed in the middle, on another machine than where it was begun.
    for shape, begun in itertools.product(SHAPES, (1, 3, 7)):
        for initial in (1, 2):
            rest = global_batches(dataset, *shape, epoch, begun * GLOBAL_BATCH, initial)
            assert rest == whole[begun:], (shape, begun, initial)


def test_epochs_differ_and_repeat(folder):
    dataset = epochs_of(folder)
    orders = [global_batches(dataset, 1, 2, 1, epoch, 0) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_loader_gives_the_planned_batches_and_resumes_at_any_of_them(tmp_path, workers):
    folder = write_images(tmp_path / "mds", 30)

    def loader() -> CheckedLoader:
        return CheckedLoader(dataset_of(folder), batch_size=4, num_workers=workers)

    def ids(batches) -> list[list[int]]:
        return [batch["sample_ids"].tolist() for batch in batches]

    whole = ids(loader())
    assert len(whole) == len(loader()) == 7
    for begun in (3, 7):
        resumed = loader()
        state = resumed.dataset.state_dict(0, from_beginning=False)
        resumed.load_state_dict({**state, "epoch": 0, "sample_in_epoch": 4 * begun})
        assert ids(resumed) == whole[begun:]
        assert len(ids(resumed)) == 7  # the next epoch is whole again


def test_between_two_epochs_the_next_one_is_named(folder):
    dataset = epochs_of(folder)
    assert dataset.state_dict(0, from_beginning=True)["epoch"] == 0
    list(dataset)
    state = dataset.state_dict(0, from_beginning=True)
    assert (state["epoch"], state["sample_in_epoch"]) == (1, 0)
    inside = dataset.state_dict(8, from_beginning=True)
    assert (inside["epoch"], inside["sample_in_epoch"]) == (0, 8)


# Guards


def test_an_epoch_that_ends_early_is_an_error_though_nothing_failed(folder, monkeypatch):
    dataset = epochs_of(folder)
    honest = StreamingDataset.__iter__
    monkeypatch.setattr(
        StreamingDataset, "__iter__", lambda self: itertools.islice(honest(self), 40)
    )
    with pytest.raises(DataError, match="ended after 40 of 101 samples"):
        list(dataset)


def test_a_rank_that_gets_too_few_batches_is_told(tmp_path, monkeypatch):
    loader = CheckedLoader(dataset_of(write_images(tmp_path / "mds", 30)), batch_size=4)
    honest = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", lambda self: itertools.islice(honest(self), 5))
    with pytest.raises(DataError, match="ended after 5 of 7 batches"):
        list(loader)


def test_a_fetch_that_never_ends_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lgm_scale.data.streaming_internals._GRACE", 0.5)
    source = SourceConfig(path=str(folder), cache=str(tmp_path / "cache"))
    dataset = epochs_of(source, options=StreamOptions(Patience(1, 0.5)))
    monkeypatch.setattr(EpochDataset, "prepare_shard", lambda *_: None)  # and never there
    with pytest.raises(DataError, match=r"shard\.\d+\.mds did not arrive within 1 s"):
        list(dataset)
    dataset._shard_states[:] = _ShardState.LOCAL  # or a thread would wait at the process' end


def test_labels_outside_the_classes_are_named(tmp_path):
    folder = write_labels(tmp_path / "mds", [0, 1, 2, 1], ("a", "b", "c"))
    write_manifest(folder, Manifest("images", 4, ("a", "b"), (1, 3)))
    with pytest.raises(DataError, match=r"sample 2 of .* has label 2, outside of its 2 classes"):
        list(epochs_of(folder, shuffle=False))


# Mixtures


def drawn(dataset: EpochDataset, epoch: int = 0) -> list[tuple[int, str]]:
    """(label, stored bytes) of every sample of an epoch."""
    runs, ids = dataset.resample_streams(epoch)
    assert runs.sum() == len(ids) == dataset.epoch_samples
    samples = [dataset[int(i)] for i in ids]
    return [(s["label"], s["image"].decode()) for s in samples]


def test_a_plain_source_is_drawn_as_the_library_does(folder):
    dataset = epochs_of(folder)
    runs, ids = dataset.resample_streams(0)
    expected_runs, expected_ids = super(EpochDataset, dataset).resample_streams(0)
    assert runs.tolist() == expected_runs.tolist()
    assert ids.tolist() == expected_ids.tolist() == list(range(NUM_SAMPLES))


def test_classes_are_chosen_renamed_and_numbered_by_name(folder):
    source = SourceConfig(path=str(folder), classes=("d", "a", "b"), rename={"d": "z", "b": "a"})
    dataset = epochs_of(source)
    assert dataset.manifest.classes == ("z", "a")
    samples = drawn(dataset)
    assert len(samples) == dataset.epoch_samples == dataset.manifest.num_samples == 76
    assert {label for label, _ in samples} == {0, 1}
    for label, text in samples:
        assert label == {0: 1, 1: 1, 3: 0}[int(text) % 4]


def test_sources_join_by_the_names_of_classes(folder, tmp_path):
    other = write_labels(tmp_path / "mds", [0] * 5 + [1] * 7, ("new", "b"))
    dataset = epochs_of(folder, other)
    assert dataset.manifest.classes == ("a", "b", "c", "d", "new")
    assert dataset.manifest.class_counts == (26, 25 + 7, 25, 25, 5)
    samples = drawn(dataset)
    assert len(samples) == 113
    assert [label for label, _ in samples[NUM_SAMPLES:]] == [4] * 5 + [1] * 7
    seen = sorted(sample["label"] for sample in dataset)  # an epoch, as a loader reads it
    assert seen == sorted(label for label, _ in samples)


def test_proportions_hold_exactly_and_repeats_are_even(folder, tmp_path):
    small = write_labels(tmp_path / "mds", [0] * 9, ("new",))
    dataset = epochs_of(
        SourceConfig(path=str(folder), proportion=1), SourceConfig(path=str(small), proportion=3)
    )
    assert dataset.samples_taken == [28, 82]
    for epoch in (0, 1):
        samples = drawn(dataset, epoch)
        repeats = [samples.count((4, str(i))) for i in range(9)]
        assert sum(repeats) == 82
        assert max(repeats) - min(repeats) == 1
        assert len({text for label, text in samples if label < 4}) == 28
    assert drawn(dataset, 0) != drawn(dataset, 1)
    assert drawn(dataset, 0) == drawn(dataset, 0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"classes": ("a", "bb")}, "classes names 'bb', but .* did you mean 'b'"),
        ({"rename": {"x": "y"}}, "rename names 'x', but .* its classes are a, b, c, d"),
        ({"classes": ("a",), "rename": {"b": "y"}}, "rename has 'b' .* which classes leaves out"),
    ],
)
def test_unknown_classes_are_named(folder, changes, text):
    with pytest.raises(DataError, match=text):
        epochs_of(SourceConfig(path=str(folder), **changes))


def test_a_folder_without_labels_cannot_be_a_part(tmp_path):
    folder = write_labels(tmp_path / "mds", [0, 1], ("a", "b"))
    (folder / LABELS_NAME).unlink()
    assert len(list(epochs_of(folder))) == 2
    with pytest.raises(DataError, match=r"labels\.npy is missing.*Make it anew"):
        epochs_of(SourceConfig(path=str(folder), classes=("a",)))
    np.save(folder / LABELS_NAME, np.array([1, 1]))
    with pytest.raises(DataError, match="other counts of the classes"):
        epochs_of(SourceConfig(path=str(folder), classes=("a",)))


def test_data_sets_opened_at_one_moment_do_not_meet(folder, monkeypatch):
    """Two searches for a free name that start before either has taken one."""
    first = epochs_of(folder)
    monkeypatch.setattr(
        shared_prefix, "_check_and_find", lambda *_, **__: next(shared_prefix._each_prefix_int())
    )
    second = epochs_of(folder)
    assert first._shm_prefix_int != second._shm_prefix_int
    assert len(list(first)) == len(list(second)) == NUM_SAMPLES


# A cache that is too small


def test_a_shard_that_was_evicted_while_it_was_waited_for_is_fetched_again(folder, monkeypatch):
    """The library's thread waits for it for ever: it looked once, when the shard was on its way."""
    dataset = epochs_of(folder, options=StreamOptions(Patience(1, 2), cache_limit=10**6))
    dataset._event = threading.Event()
    on_its_way, evicted, there = 2, 1, 3
    it = SimpleNamespace(
        sample_ids=np.array([-1, 0]), total=2, yield_index=0, ready_index=1,
        should_exit=lambda: False, on_exit=lambda: None,
    )  # fmt: skip
    fetched = []

    def prepare(shard_id, blocking):
        fetched.append(shard_id)
        dataset._shard_states[shard_id] = there
        it.ready_index = 2  # the library's thread has seen it

    monkeypatch.setattr(dataset, "prepare_shard", prepare)
    dataset._shard_states[0] = on_its_way

    def evict_soon():
        time.sleep(0.1)
        assert not fetched  # whoever fetches a shard is left alone
        dataset._shard_states[0] = evicted

    thread = threading.Thread(target=evict_soon)
    thread.start()
    assert list(dataset._each_sample_id(it)) == [0]
    thread.join()
    assert fetched == [0]
