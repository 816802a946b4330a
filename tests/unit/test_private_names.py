"""Names inside mosaicml-streaming that `lgm_scale/data` builds on: each is there, or says its loss.

They were read from version 0.13.0. A new version that moves one fails here, with what would break;
mend `lgm_scale/data/streaming_internals.py` then, and the version in its first lines.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from streaming.base import dataset as library
from streaming.base.format.mds import encodings
from streaming.base.shared import prefix
from streaming.base.world import World

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "lgm_scale/data/streaming_internals.py"

# Owner, name, and what breaks without it.
NAMES: list[tuple[Any, str, str]] = [
    (prefix, "_each_prefix_int", "two runs that start at one moment share their memory"),
    (encodings, "_get_coder", "a column's type is parsed for every value"),
    (StreamingDataset, "_resume_incr_epoch", "workers draw flips and crops of another epoch"),
    (StreamingDataset, "_get_work", "an epoch that ends early looks complete"),
    (StreamingDataset, "_prepare_thread", "a process whose fetch failed never ends"),
    (StreamingDataset, "_ready_thread", "a process whose fetch failed never ends"),
    (StreamingDataset, "_each_sample_id", "a fetch that hangs is waited for without end"),
    (StreamingDataset, "on_exception", "the cause of a failed fetch is lost"),
    (StreamingDataset, "prepare_shard", "other processes do not learn of a failed fetch"),
    (StreamingDataset, "resample_streams", "mixtures and proportions are ignored"),
    (StreamingDataset, "_event", "a failed fetch does not stop the other threads"),
    (StreamingDataset, "_shard_states", "other processes do not learn of a failed fetch"),
    (StreamingDataset, "_cache_filelock_path", "the cause of another process's failure is lost"),
    (StreamingDataset, "sample_offset_per_stream", "a mixture draws samples of other sources"),
    (StreamingDataset, "sample_offset_per_shard", "the runs of samples within shards are unknown"),
    (StreamingDataset, "stream_per_shard", "a sample's source, and so its label, is unknown"),
    (StreamingDataset, "spanner", "a sample's shard is unknown"),
    (StreamingDataset, "epoch_size", "an epoch's length cannot be set"),
    (library._Iterator, "on_exit", "the library waits for a thread that is gone"),
    (library._Iterator, "should_exit", "a loop goes on after a new epoch has begun"),
    (library._Iterator, "sample_ids", "the guard's loop has no samples"),
    (library._Iterator, "total", "the guard's loop has no end"),
    (library._Iterator, "ready_index", "the guard's loop gives samples that are not there"),
    (library._Iterator, "yield_index", "the library reads ahead without bound"),
    (library._ShardState, "LOCAL", "every sample takes the lock of the whole node"),
    (library._ShardState, "REMOTE", "a shard that was evicted is waited for without end"),
    (Stream, "_download_file", "the library fetches by itself, without our patience and errors"),
    (Stream, "get_shards", "a fetched shard is compared with nothing"),
    (Stream, "set_up_local", "half a shard of a killed run counts as whole"),
    (StreamingDataLoader, "num_samples_yielded", "a resumed run begins at another batch"),
    (World, "detect", "the number of ranks is unknown"),
    (World, "is_local_leader", "every rank fills the cache of its node"),
    (MDSWriter, "flush_shard", "a part is not one shard"),
    (MDSWriter, "new_samples", "an empty part makes a shard"),
    (MDSWriter, "executor", "writing a part sleeps a second and writes an index of its own"),
]
MODULES = {
    "streaming.base.constant": ("TICK",),
    "streaming.base.distributed": ("all_gather_object", "maybe_init_dist"),
    "streaming.base.format.base.reader": ("FileInfo", "Reader"),
    "streaming.base.storage": ("CloudDownloader", "CloudUploader"),
}


def has(owner: Any, name: str) -> bool:
    """Whether a module or class has a name, or its methods give one to its instances."""
    if hasattr(owner, name) or name in getattr(owner, "__annotations__", {}):
        return True
    classes = [base for base in getattr(owner, "__mro__", ()) if base is not object]
    ours = (base for base in classes if base.__module__.startswith("streaming"))
    return any(f"self.{name}" in inspect.getsource(base) for base in ours)


@pytest.mark.parametrize(("owner", "name", "without"), NAMES, ids=[name for _, name, _ in NAMES])
def test_a_name_of_streaming_is_there(owner, name, without):
    assert has(owner, name), f"streaming has no {owner.__name__}.{name} any more: {without}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_streaming_is_there(module):
    found = importlib.import_module(module)
    assert [name for name in MODULES[module] if not hasattr(found, name)] == []


def test_no_state_of_a_shard_is_our_sign_of_a_failure():
    from lgm_scale.data.streaming_internals import _FAILED

    assert _FAILED not in {int(state) for state in library._ShardState}


def test_a_name_that_is_gone_is_seen():
    assert not has(StreamingDataset, "_resume_incr_epochs")
    assert not has(library._Iterator, "ready_indices")


def test_only_the_adapter_uses_the_inside_of_streaming():
    found = set()
    for path in sorted((ROOT / "lgm_scale").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("streaming."):
                found.add((path.relative_to(ROOT).as_posix(), node.module))
    # Kinds of object storage, and how shards are compressed and checked, have no other door.
    public = ("streaming.base.storage", "streaming.base.compression", "streaming.base.format")
    assert {path for path, module in found if module not in public} == {ADAPTER}
