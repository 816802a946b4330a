"""Resume state: whole or passed over, ours or not read, and written by one attempt at a time."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from rank_processes import rewound, states, waited_for
from small_pipeline import Steps, metrics, train_in_process

from lgm_scale.checkpoint.attempts import Attempts, valid_states
from lgm_scale.checkpoint.checkpointer import Checkpointer
from lgm_scale.checkpoint.manifest import StateManifest, StateName
from lgm_scale.errors import CheckpointError, ConfigError, LGMError, SupersededError
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.stores import Storage, open_storage
from lgm_scale.storage.transfer import Patience


@pytest.fixture(scope="module")
def finished(small_pipeline) -> Path:
    """A run of 10 steps with states after 2, 4, 6, 8 and 10."""
    return train_in_process(config(small_pipeline, small_pipeline.root / "checkpoints"))


def config(pipeline, out: Path) -> Path:
    interval = {"interval": "2ba", "keep": 9}
    return pipeline.generator_config(out, run_name="checkpoints", checkpoint=interval)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The run as it was right before its result was written: states 2 to 10."""
    return rewound(finished, tmp_path / "copy", 10)


def go_on(pipeline, out: Path) -> int:
    """Train to the end; the step at which it went on."""
    train_in_process(config(pipeline, out))
    attempts = sorted((out / "state" / "attempts").iterdir())
    return json.loads(attempts[-1].read_text())["resumed_step"]


def assert_same(out: Path, finished: Path) -> None:
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in metrics(finished)]
    name = Path("bundle") / "generator.safetensors"
    assert (out / name).read_bytes() == (finished / name).read_bytes()


def state_file(out: Path, step: int, name: str) -> Path:
    (folder,) = (out / "state").glob(f"ba{step:08d}-*")
    return folder / name


def test_the_newest_states_are_kept(small_pipeline, tmp_path):
    out = tmp_path / "run"
    path = small_pipeline.generator_config(out, checkpoint={"interval": "2ba", "keep": 2})
    train_in_process(path)
    assert [name[:10] for name in states(out)] == ["ba00000008", "ba00000010"]
    assert len(list((out / "state").glob("ba*"))) == 2


def test_a_result_lost_before_it_was_written_is_made_again(small_pipeline, finished, copy):
    assert go_on(small_pipeline, copy) == 10
    assert_same(copy, finished)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_state_is_passed_over(small_pipeline, finished, copy, name, damage, caplog):
    path = state_file(copy, 10, name)
    content = bytearray(path.read_bytes())
    place = random.Random(name + damage).randrange(1, len(content) - 1)
    if damage == "cut":
        content = content[:place]
    else:
        content[place] ^= 0x10
    path.write_bytes(content)
    assert go_on(small_pipeline, copy) == 8
    assert "state ba00000010-a0001 is passed over" in caplog.text
    assert_same(copy, finished)


def test_several_damaged_states_are_passed_over(small_pipeline, finished, copy):
    state_file(copy, 10, "rank-00000.safetensors").unlink()
    state_file(copy, 8, "manifest.json").unlink()
    state_file(copy, 6, "rank-00000.safetensors").write_bytes(b"")
    assert go_on(small_pipeline, copy) == 4
    assert_same(copy, finished)


def test_no_whole_state_is_an_error_and_no_new_start(small_pipeline, copy):
    for step in (2, 4, 6, 8, 10):
        state_file(copy, step, "rank-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="5 states and none is whole"):
        go_on(small_pipeline, copy)


class Attack:
    """Unpickling it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_no_pickle_is_ever_executed(small_pipeline, finished, copy, tmp_path):
    mark = tmp_path / "executed"
    hostile = pickle.dumps(Attack(mark))
    pickle.loads(hostile)
    assert mark.exists()  # it would work
    mark.unlink()
    for name in ("rank-00000.safetensors", "manifest.json", "latest-rank0.pt"):
        state_file(copy, 10, name).write_bytes(hostile)
    (copy / "state" / "latest-rank0.pt").write_bytes(hostile)
    assert go_on(small_pipeline, copy) == 8
    assert_same(copy, finished)
    assert not mark.exists()


def test_a_hostile_file_with_its_checksum_is_no_safetensors_file(small_pipeline, copy, tmp_path):
    mark = tmp_path / "executed"
    path = state_file(copy, 10, "rank-00000.safetensors")
    path.write_bytes(pickle.dumps(Attack(mark)))
    sealed = state_file(copy, 10, "manifest.json")
    manifest = StateManifest.from_bytes(sealed.read_bytes())
    (file,) = manifest.files
    changed = vars(file) | {"sha256": file_hash(path), "size": path.stat().st_size}
    new = StateManifest(**(vars(manifest) | {"files": [type(file)(**changed)]}))
    sealed.write_bytes(new.to_bytes())
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors"):
        go_on(small_pipeline, copy)
    assert not mark.exists()


def test_the_state_of_another_run_is_not_read(small_pipeline, finished, copy, tmp_path):
    other = tmp_path / "other"
    train_in_process(config(small_pipeline, other))
    for name in ("rank-00000.safetensors", "manifest.json"):
        shutil.copy(state_file(other, 10, name), state_file(copy, 10, name))
    assert go_on(small_pipeline, copy) == 8


def test_another_configuration_is_refused_with_its_keys(small_pipeline, finished, tmp_path):
    path = config(small_pipeline, tmp_path / "new")
    changes = ("optimizer.lr=0.5", "model.num_blocks=2")
    with pytest.raises(ConfigError, match="another configuration") as caught:
        train_in_process(path, f"checkpoint.folder={finished / 'state'}", *changes)
    assert "optimizer.lr: 0.001 there, 0.5 here" in str(caught.value)
    assert "model.num_blocks: 4 there, 2 here" in str(caught.value)


def test_another_model_is_refused(small_pipeline, copy):
    run = copy / "state" / "run.json"
    run.write_text(run.read_text().replace('"tiny"', '"s"'))
    (copy / "config.json").write_text((copy / "config.json").read_text().replace('"tiny"', '"s"'))
    path = config(small_pipeline, copy)
    with pytest.raises(CheckpointError, match=r"another model.*pos_embed \[1, 16, 128\] there"):
        train_in_process(path, "model.size=s")


def test_a_key_younger_than_the_run_counts_with_its_default(small_pipeline, finished, copy):
    for path in (copy / "config.json", copy / "state" / "run.json"):
        record = json.loads(path.read_text())
        del record.get("config", record)["ema"]["interval"]
        path.write_text(json.dumps(record))
    assert go_on(small_pipeline, copy) == 10


def test_states_of_unknown_origin_are_refused(small_pipeline, copy):
    (copy / "state" / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"states without run\.json"):
        go_on(small_pipeline, copy)


# --- one writer -----------------------------------------------------------------------------


def test_an_attempt_that_was_replaced_writes_no_more(small_pipeline, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(Checkpointer, "save", waited_for(Checkpointer.save))  # 4 is found

    def on_step(step: int, batch: dict) -> None:
        if step == 5:  # it was cut off, and another one took over
            Attempts(Storage(out / "state")).start(4, 1, "ddp")

    with pytest.raises(SupersededError, match="attempt 2 has taken over"):
        train_in_process(config(small_pipeline, out), on_step=on_step)
    assert [name[:10] for name in states(out)] == ["ba00000002", "ba00000004"]
    assert not list((out / "state").glob("ba00000006*"))
    assert not (out / "bundle").exists()
    assert go_on(small_pipeline, out) == 4


def test_what_it_wrote_behind_the_back_of_the_other_is_never_read(small_pipeline, finished, copy):
    # Attempt 2 began at step 4, as if states 6 to 10 had been written by attempt 1 after that.
    Attempts(Storage(copy / "state")).start(4, 1, "ddp")
    assert go_on(small_pipeline, copy) == 4
    assert_same(copy, finished)


def test_valid_states_are_those_of_one_history(tmp_path):
    attempts = Attempts(Storage(tmp_path))
    for step in (0, 300, 200, 400):
        attempts.start(step, 8, "fsdp")
    written = [StateName(*pair) for pair in ((100, 1), (200, 1), (300, 1), (400, 1), (250, 2))]
    written += [StateName(400, 3), StateName(500, 3), StateName(500, 4), StateName(100, 9)]
    found = valid_states(written, attempts.all())
    assert found == [StateName(*pair) for pair in ((500, 4), (400, 3), (200, 1), (100, 1))]


def test_two_starts_at_one_moment(tmp_path):
    first, second = Attempts(Storage(tmp_path)), Attempts(Storage(tmp_path))
    seen = first.all()
    second.all = lambda: seen  # type: ignore[method-assign]  # both have looked before one wrote
    first.start(0, 1, "ddp")
    with pytest.raises(CheckpointError, match="at the same moment"):
        second.start(0, 1, "ddp")


def test_a_write_is_whole_or_not_there(tmp_path, monkeypatch):
    storage = Storage(tmp_path / "state")
    storage.write("run.json", b"old")

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        storage.write("run.json", b"new")
    assert storage.read("run.json") == b"old"
    assert storage.names() == ["run.json"]


def test_a_full_disk_ends_the_run_with_its_reason(small_pipeline, tmp_path, monkeypatch):
    def full(self, path, name):
        raise OSError(28, "No space left on device")

    put = Storage.put
    monkeypatch.setattr(
        Storage, "put", lambda *args: (full if "safetensors" in args[2] else put)(*args)
    )
    with pytest.raises(CheckpointError, match=r"rank 0 could not write ba00000002-a0001.*No space"):
        train_in_process(config(small_pipeline, tmp_path / "run"))
    assert states(tmp_path / "run") == []


# In object storage


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "s", "REGION": "x"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="runs")
    yield "s3://runs"
    server.stop()


@pytest.mark.slow
def test_a_run_in_a_bucket_needs_no_disk_of_its_machine(
    small_pipeline, finished, bucket, tmp_path, capsys
):
    def at(out: str) -> Path:
        checkpoint = {"interval": "2ba", "keep": 2, "folder": f"{bucket}/one"}
        return small_pipeline.generator_config(
            tmp_path / out, run_name="checkpoints", checkpoint=checkpoint
        )

    with pytest.raises(KeyboardInterrupt):
        train_in_process(at("first"), on_step=Steps(stop=5))
    shutil.rmtree(tmp_path / "first")
    assert_same(train_in_process(at("second")), finished)
    storage = open_storage(f"{bucket}/one", "checkpoint.folder", Patience(1, 5))
    tops = {name.split("/")[0] for name in storage.names()}
    assert {"ba00000008-a0002", "ba00000010-a0002"} == {top for top in tops if top[:2] == "ba"}
    assert json.loads(storage.read("attempts/0002.json"))["resumed_step"] == 4
    shutil.rmtree(tmp_path / "second")
    assert_same(train_in_process(at("third")), finished)  # its result is fetched
    assert "is finished" in capsys.readouterr().out


def test_a_bucket_that_is_not_there_is_told_with_its_key(small_pipeline, bucket, tmp_path):
    checkpoint = {"interval": "2ba", "folder": "s3://no-such-bucket/run"}
    path = small_pipeline.generator_config(tmp_path / "run", checkpoint=checkpoint)
    with pytest.raises(LGMError, match=r"^checkpoint.folder: s3://no-such-bucket/run .*NoSuchBuc"):
        train_in_process(path)
