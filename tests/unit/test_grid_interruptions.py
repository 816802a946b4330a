"""An encoding to a grid that is interrupted or killed ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from small_pipeline import run_command
from test_grids import COUNT, contents, options
from test_images import write_images
from test_latents import encode

from lgm_scale.data.preparation.latents import LatentWriter
from lgm_scale.data.preparation.verify import verify
from lgm_scale.errors import DataError


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Noise of 24 x 20 pixels in 3 classes."""
    return write_images(tmp_path_factory.mktemp("images") / "mds", COUNT)


def test_an_interrupted_encoding_goes_on_where_it_was(vae, images, tmp_path, monkeypatch):
    small = options(vae, images) | {"shard-size": 1000, "batch-size": 4}
    assert encode(monkeypatch, **small, out=tmp_path / "whole") == 0
    write, made = LatentWriter._write_part, []

    def note(self, work, number, *rest) -> None:
        made.append(number)
        if made == [0, 1, 2]:
            raise KeyboardInterrupt
        write(self, work, number, *rest)

    monkeypatch.setattr(LatentWriter, "_write_part", note)
    with pytest.raises(KeyboardInterrupt):
        encode(monkeypatch, **small, out=tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(DataError, match=r"unfinished result of another .*image_size"):
        encode(monkeypatch, **small | {"image-size": 24}, out=tmp_path / "stopped")
    assert encode(monkeypatch, **small, out=tmp_path / "stopped") == 0
    shards = len(list((tmp_path / "whole").glob("shard.*")))
    assert shards == 6
    assert made == [0, 1, 2, *range(2, shards)]
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def die_in_the_fourth_part() -> None:
    """Parts of one batch: SIGKILL meets the command while a shard is being written."""
    encode_batch, seen = LatentWriter.encode, []

    def dying(self, batch, notes):
        seen.append(batch)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_batch(self, batch, notes)

    LatentWriter.encode = dying  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.system
def test_after_a_kill_two_ranks_finish_with_the_same_bytes(vae, images, tmp_path, monkeypatch):
    small = options(vae, images) | {"shard-size": 300, "batch-size": 2}  # two images each
    assert encode(monkeypatch, **small, out=tmp_path / "whole") == 0
    words = [str(word) for key, value in small.items() for word in (f"--{key}", value)]
    words += ["--out", str(tmp_path / "killed")]
    program = "data_tools/encode_latents.py"
    killed = run_command(program, *words, prepare=die_in_the_fourth_part)
    assert killed.returncode == -signal.SIGKILL
    aside = tmp_path / "killed.partial"
    assert not (tmp_path / "killed").exists()
    numbers = [path.name.split(".")[1] for path in aside.glob("part.*.json")]
    kept = {f"shard.{number}.mds" for number in numbers}
    times = {name: (aside / name).stat().st_mtime_ns for name in kept}
    assert len(kept) == 3
    result = run_command(program, *words, ranks=2)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "killed").glob("shard.*"))) == 20
    assert {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in kept} == times
    assert verify(str(tmp_path / "killed")).problems == []
