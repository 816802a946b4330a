"""The training command as users run it: kill -9 and resume, ranks, bad input, dry runs."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
from rank_processes import die_at_step
from safetensors.torch import load_file
from small_pipeline import assert_user_error, metrics, run_command, train_in_process

from lgm_scale.build import build_dataset
from lgm_scale.bundle import read_bundle
from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.training.loggers import build_loggers

TRAIN = "lgm_scale/train.py"


@pytest.fixture(scope="module")
def undisturbed(small_pipeline) -> Path:
    """A finished generator run of 10 steps on one rank."""
    out = small_pipeline.root / "undisturbed"
    result = run_command(TRAIN, small_pipeline.generator_config(out))
    assert result.returncode == 0, result.stderr
    assert "10 steps done" in result.stdout
    return out


def test_a_run_records_every_step_and_leaves_a_bundle(undisturbed):
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows] == list(range(10))
    assert [row["num_tokens"] for row in rows] == [8, 4, 16, 8, 4, 16, 8, 4, 16, 8]
    info = read_bundle(undisturbed / "bundle", "generator")
    assert info["training"]["steps"] == 10
    assert len(info["classes"]) == 17


def test_kill_9_and_the_same_command_again_change_nothing(small_pipeline, tmp_path, undisturbed):
    out = tmp_path / "killed"
    config = small_pipeline.generator_config(out, logging={"interval": 1, "progress_bar": False})
    assert run_command(TRAIN, config, prepare=partial(die_at_step, 6)).returncode == -signal.SIGKILL
    assert (out / "state" / "ba00000004-a0001" / "manifest.json").exists()
    assert not (out / "bundle").exists()
    torn = out / "state" / "ba00000008-a0001"  # as if it had been writing the next one
    torn.mkdir()
    (torn / "rank-00000.safetensors").write_bytes(b"torn")
    result = run_command(TRAIN, config)
    assert result.returncode == 0, result.stderr
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in metrics(undisturbed)]
    weights, expected = (
        load_file(folder / "bundle" / "generator.safetensors") for folder in (out, undisturbed)
    )
    assert all((weights[name] == expected[name]).all() for name in expected)


def test_a_finished_run_says_so(small_pipeline, undisturbed):
    before = (undisturbed / "bundle" / "bundle.json").stat().st_mtime_ns
    result = run_command(TRAIN, undisturbed.with_suffix(".yaml"))
    assert result.returncode == 0
    assert "is finished" in result.stdout
    assert (undisturbed / "bundle" / "bundle.json").stat().st_mtime_ns == before


def test_micro_batches_give_the_numbers_of_whole_batches(small_pipeline, undisturbed):
    out = small_pipeline.root / "micro"
    train_in_process(small_pipeline.generator_config(out), "train.device_microbatch_size=2")
    for first, second in zip(metrics(undisturbed), metrics(out), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-6)


def test_a_tokenizer_trains_and_its_bundle_loads(small_pipeline):
    out = small_pipeline.root / "tokenizer-run"
    result = run_command(TRAIN, small_pipeline.tokenizer_config(out), "logging.tensorboard=true")
    assert result.returncode == 0, result.stderr
    assert list((out / "tensorboard").rglob("events.out.*"))
    rows = metrics(out)
    assert len(rows) == 10
    assert all(("alignment" in row) == (row["num_tokens"] < 16) for row in rows)
    assert read_bundle(out / "bundle", "tokenizer")["kind"] == "tokenizer"


def test_a_config_error_ends_with_status_2(small_pipeline, undisturbed):
    config = undisturbed.with_suffix(".yaml")
    assert_user_error(
        run_command(TRAIN, config, "model.sise=s", "lengths.choices=[2]"),
        "did you mean 'size'?",
        "[2] outside [4, 16]",
    )


def test_another_run_in_the_folder_is_refused(undisturbed):
    result = run_command(TRAIN, undisturbed.with_suffix(".yaml"), "seed=1")
    assert_user_error(result, "seed: 0 there, 1 here")


def test_wrong_data_ends_with_status_2(small_pipeline):
    out = small_pipeline.root / "wrong-data"
    config = small_pipeline.generator_config(out)
    result = run_command(TRAIN, config, f"data.path={small_pipeline.images}")
    assert_user_error(result, "holds images, but latents")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.path={root}/nowhere", "does not exist"),
        ("data.path={root}", "has no index.json"),
        ("data.num_samples=70", "holds 68 samples, data.num_samples says 70"),
        ("train.global_batch_size=128", "fewer than one batch"),
        ("model.num_classes=10", "has 17 classes, model.num_classes says 10"),
        ("model.latent_dim=16", "the model wants 16 x 16"),
    ],
)
def test_data_that_does_not_fit_is_named(small_pipeline, override, text):
    path = small_pipeline.generator_config(small_pipeline.root / "unfit")
    overrides = [override.format(root=small_pipeline.root)]
    config = load_training_run(str(path), overrides, 1, has_gpu=False)
    with pytest.raises(DataError, match=text):
        build_dataset(config)


def test_wandb_must_be_installed(small_pipeline, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = small_pipeline.generator_config(small_pipeline.root / "unlogged")
    config = load_training_run(str(path), ["logging.wandb_project=x"], 1, has_gpu=False)
    with pytest.raises(ConfigError, match=r"pip install 'lgm-scale\[wandb\]'"):
        build_loggers(config)


def test_a_dry_run_needs_neither_data_nor_gpu(tmp_path):
    result = run_command(
        TRAIN, "yamls/dit_xl.yaml", f"out={tmp_path}/run", "--dry-run", "--world-size", "64",
        fresh=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "675.3 M" in result.stdout
    assert "64 ranks" in result.stdout
    assert not (tmp_path / "run").exists()
