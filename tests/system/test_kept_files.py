"""What earlier code wrote is read as before: bundles, resume states, finished sweeps.

The files lie in tests/golden/kept, whose README says how they were made. They are read through
commands and `load_pipeline` alone, so that this test stays the same whatever moves inside.

Numbers are compared to the last bit where this machine computes the bits of the one that wrote
them (`kept_files.arithmetic`), else within the tolerances below. LGM_KEPT_EXACT=1 insists on bits.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_files import (
    GENERATORS,
    KEPT,
    RECONSTRUCTED,
    STATE_STEP,
    STATES,
    STEPS,
    SWEEPS,
    arithmetic,
    compares_bits,
    content_of,
    digest,
    final_weights,
    metrics_of,
    read_expected,
    rows_of,
    run_at,
    some_values,
    unpack,
)
from PIL import Image

from lgm_scale import load_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.system]

EXPECTED: dict[str, Any] = read_expected()
EXACT = compares_bits()
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4
METRIC_TOLERANCE = 1e-4


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Nested numbers: equal, or on another kind of machine close."""
    if EXACT and tolerance != METRIC_TOLERANCE:
        assert found == expected
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, tolerance)
    else:
        # LAPACK, which takes the roots of a distance's matrices, has kernels of its own choice.
        tolerance = 1e-12 if EXACT else tolerance
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


def assert_same_images(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.uint8
    assert found.shape == expected.shape
    if EXACT:
        np.testing.assert_array_equal(found, expected)
    else:
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_this_machine_computes_the_bits_that_were_kept():
    if arithmetic() != EXPECTED["arithmetic"]:
        pytest.skip("this machine rounds otherwise: numbers are compared within tolerances")


# --- bundles ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The data and all bundles, not to be changed."""
    folder = tmp_path_factory.mktemp("kept")
    for name in ("data", "bundle_tokenizer", *(f"bundle_{name}" for name in GENERATORS)):
        unpack(name, folder)
    return folder


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    with np.load(KEPT / "images.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "num_tokens"),
    [(name, k) for name, (lengths, _) in GENERATORS.items() for k in lengths],
)
@pytest.mark.usefixtures("one_thread")
def test_a_bundle_makes_the_same_images(kept, images, name, num_tokens):
    pipe = load_pipeline(kept / "bundles" / name, device="cpu")
    classes = GENERATORS[name][1]
    found = pipe(classes, num_tokens=num_tokens, seed=0, progress_bar=False)
    assert_same_images(found, images[f"{name}_{num_tokens}"])


def test_kept_images_tell_lengths_adapters_and_classes_apart(images):
    """Or the test above would prove little."""

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        return np.abs(one.astype(int) - other).mean()

    for pair in (("lgm_4", "lgm_9"), ("lora_8", "lora_16"), ("elit_4", "elit_12")):
        assert apart(*(images[name] for name in pair)) > 5
    for values in images.values():
        assert apart(values[0], values[1]) > 5


@pytest.mark.parametrize("name", ["lgm", "elit"])
def test_the_sample_command_draws_the_same_images(kept, images, tmp_path, name):
    lengths, classes = GENERATORS[name]
    arguments = ["--classes", *classes, "--num-tokens", *map(str, lengths), "--device", "cpu"]
    out = tmp_path / "grid.png"
    run_at(kept, "-m", "lgm_scale.sample", f"bundles/{name}", *arguments, "--out", out)
    sheet = np.asarray(Image.open(out).convert("RGB"))
    margin, cell, scale = 4, 128, 8  # of the sheet, from its lower right corner
    for row, k in enumerate(lengths):
        for column in range(len(classes)):
            bottom = len(sheet) - (len(lengths) - 1 - row) * (cell + margin) - margin
            right = sheet.shape[1] - (len(classes) - 1 - column) * (cell + margin) - margin
            tile = sheet[bottom - cell : bottom, right - cell : right]
            assert_same_images(tile[::scale, ::scale], images[f"{name}_{k}"][column])


def test_a_tokenizer_bundle_encodes_to_the_same_latents(kept, tmp_path):
    run_at(
        kept, "data_tools/encode_latents.py", "--tokenizer", "bundles/tokenizer",
        "--images", "data/images", "--out", tmp_path / "latents",
    )  # fmt: skip
    found, expected = content_of(tmp_path / "latents"), content_of(kept / "data" / "latents")
    assert found.keys() == expected.keys()
    if EXACT:
        assert found == expected


def test_a_tokenizer_bundle_reconstructs_with_the_same_numbers(kept, tmp_path):
    lengths = map(str, RECONSTRUCTED)
    run_at(
        kept, "eval/reconstruct.py", "--bundle", "bundles/tokenizer", "--images", "data/images",
        "--out", tmp_path / "out", "--lengths", *lengths,
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert_close(metrics_of(results), EXPECTED["reconstruction"], METRIC_TOLERANCE)


# --- states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATES)
def test_a_state_goes_on_with_the_same_numbers(tmp_path, name):
    """`fsdp1` was written under FSDP 1, by parallel.fsdp.version=1; it goes on under FSDP 2."""
    for archive in ("data", "bundle_tokenizer", f"state_{name}"):
        unpack(archive, tmp_path)
    shutil.copy(KEPT / "runs" / f"{name}.yaml", tmp_path / "runs")
    out, (_, ranks) = tmp_path / "runs" / name, STATES[name]
    result = run_at(tmp_path, "lgm_scale/train.py", f"runs/{name}.yaml", ranks=ranks)
    assert f"{STEPS} steps done" in result.stdout
    attempts = sorted((out / "state" / "attempts").iterdir())
    assert json.loads(attempts[-1].read_text())["resumed_step"] == STATE_STEP
    expected = EXPECTED["resumed"][name]
    rows = rows_of(out)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert len(rows) == len(expected["rows"])
    for row, wanted in zip(rows, expected["rows"], strict=True):
        assert_close(row, wanted, LOSS_TOLERANCE)
    weights = final_weights(out)
    assert_close(some_values(weights), expected["weights"], WEIGHT_TOLERANCE)
    if EXACT:
        assert digest(weights) == expected["weights_sha256"]


# --- sweeps -----------------------------------------------------------------------------------


def work_of(out: Path) -> dict[str, str]:
    """Files that hold finished work."""
    return {
        f"{top}/{name}": value
        for top in ("rows", "chunks")
        for name, value in content_of(out / top).items()
    }


@pytest.fixture
def swept(kept, tmp_path):
    """Unpack a finished sweep beside its inputs."""

    def at(name: str) -> Path:
        for top in ("data", "bundles"):
            (tmp_path / top).symlink_to(kept / top)
        unpack(f"sweep_{name}", tmp_path)
        shutil.copy(KEPT / "sweeps" / f"{name}.yaml", tmp_path / "sweeps")
        return tmp_path / "sweeps" / name

    return at


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """Of results.json: versions of other packages go, too."""
    rows = {
        key: [{k: v for k, v in row.items() if k != "run"} for row in results[key]]
        for key in ("rows", "searched", "reconstructions")
    }
    # What is off counts, not the words of the advice beside it.
    off = sorted(results["off"])
    return results | rows | {"versions": None, "run": None, "off": off}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_finished_sweep_is_not_made_again(swept, tmp_path, name):
    out = swept(name)
    before, results = work_of(out), json.loads((out / "results.json").read_text())
    said = run_at(tmp_path, "eval/sweep.py", f"sweeps/{name}.yaml").stdout
    states = re.findall(r"^(?:K = |reconstructions|validation).*?(kept|done)", said, re.M)
    assert len(states) >= len(results["rows"]) + len(results["reconstructions"])
    assert set(states) == {"kept"}
    assert work_of(out) == before
    after = json.loads((out / "results.json").read_text())
    assert [row["run"] for row in after["rows"]] == [row["run"] for row in results["rows"]]
    assert without_times(after) == without_times(results)
    assert (out / "index.html").is_file()


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_that_is_made_again_has_the_same_numbers(swept, tmp_path, name):
    results = json.loads((swept(name) / "results.json").read_text())
    run_at(tmp_path, "eval/sweep.py", f"sweeps/{name}.yaml", f"out=sweeps/{name}-again")
    again = json.loads((tmp_path / "sweeps" / f"{name}-again" / "results.json").read_text())
    assert_close(metrics_of(again), metrics_of(results), METRIC_TOLERANCE)
    if EXACT:  # the row's name is a digest of all that its numbers depend on
        assert [row["key"] for row in again["rows"]] == [row["key"] for row in results["rows"]]
