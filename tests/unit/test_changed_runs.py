"""A failed start claims nothing, and a run may be changed on purpose: both as a user types it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from far_storage import FarStorage
from rank_processes import rewound
from safetensors.torch import load_file
from small_pipeline import SmallPipeline, losses, metrics
from typed_commands import refusal, typed

from lgm_scale.train import main
from lgm_scale.training.guard import FiniteGuard

STEPS = {"max_duration": "6ba", "global_batch_size": 8, "precision": "fp32"}
EVERY = {"interval": "2ba", "keep": 9}
ALLOW_LR = ("--allow-change", "optimizer.lr")


def config(pipeline: SmallPipeline, out: Path, **changes: object) -> Path:
    values = {"run_name": "changed", "train": STEPS, "checkpoint": EVERY}
    return pipeline.generator_config(out, **(values | changes))


@pytest.fixture(scope="module")
def finished(small_pipeline) -> Path:
    """A run of 6 steps."""
    out = small_pipeline.root / "changed"
    assert typed(main, config(small_pipeline, out)).status == 0
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """That run, of which the last state is after step 4, as a folder of its own."""
    return rewound(finished, tmp_path / "copy", 4)


def history(out: Path) -> list[dict]:
    return json.loads((out / "history.json").read_text())


# --- a failed start claims nothing ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        ("data.path={root}/nowhere", "data.path: {root}/nowhere does not exist"),
        ("data.path={root}/images", "holds images, but latents"),
        ("data.num_samples=70", "holds 68 samples, data.num_samples says 70"),
        ("model.num_classes=10", "has 17 classes, model.num_classes says 10"),
        ("model.latent_dim=16", "the model wants 16 x 16"),
        ("train.global_batch_size=128", "fewer than one batch of 128"),
        ("tokenizer={root}/images", "tokenizer: {root}/images is no bundle"),
    ],
)
def test_a_wrong_start_is_told_and_claims_nothing(small_pipeline, tmp_path, mistake, text):
    out, root = tmp_path / "run", small_pipeline.root
    path = config(small_pipeline, out, train=STEPS | {"max_duration": "1ba"})
    assert text.format(root=root) in refusal(main, path, mistake.format(root=root))
    assert not out.exists()


def test_all_that_is_wrong_is_told_at_once(small_pipeline, tmp_path):
    path = config(small_pipeline, tmp_path / "run")
    said = refusal(
        *(main, path, "optimizer.lr=-1", "model.sise=s", "lengths.choices=[2]"),
        *("model.num_classes=10", "data.num_samples=70", "--allow-change", "seed"),
    )
    for text in ("did you mean 'size'", "optimizer.lr: -1", "[2] outside", "has 17 classes"):
        assert text in said
    assert "data.num_samples says 70" in said
    assert "seed" not in said  # there is no run yet in which it could change


def test_missing_weights_are_told_with_the_rest_and_claim_nothing(small_pipeline, tmp_path):
    out = tmp_path / "run"
    weights = {"vgg16": "nowhere.pth"}
    path = small_pipeline.tokenizer_config(out, objective={"perceptual": 1.0}, assets=weights)
    said = refusal(main, path, "data.path=nowhere", "optimizer.lr=-1")
    for text in ("assets.vgg16: nowhere.pth is not", "data.path: nowhere does not", "lr: -1"):
        assert text in said
    assert not out.exists()


def test_a_folder_without_a_state_is_free_for_any_configuration(small_pipeline, copy):
    shutil.rmtree(copy / "state")
    (copy / "state" / "ba00000002-a0001").mkdir(parents=True)  # torn, and so no state
    path = config(small_pipeline, copy)
    assert typed(main, path, "seed=5", "train.max_duration=2ba").status == 0
    assert json.loads((copy / "config.json").read_text())["seed"] == 5
    assert [row["step"] for row in metrics(copy)] == [0, 1]


def test_a_state_that_nobody_sealed_does_not_claim_other_folders_either(small_pipeline, tmp_path):
    out, states = tmp_path / "run", tmp_path / "states"
    path = config(small_pipeline, out, checkpoint={"interval": "2ba", "folder": str(states)})
    states.mkdir()
    other = {"run_id": "x", "run_name": "other", "config": {"seed": 9}}
    (states / "run.json").write_text(json.dumps(other))
    assert typed(main, path, "train.max_duration=2ba").status == 0
    assert json.loads((states / "run.json").read_text())["run_id"] != "x"
    assert "holds a run with another" in refusal(main, path, "train.max_duration=2ba", "seed=1")


def test_the_advice_after_a_wrong_start_works(small_pipeline, tmp_path):
    path = config(small_pipeline, tmp_path / "run", train=STEPS | {"max_duration": "2ba"})
    with pytest.MonkeyPatch.context() as patch:  # found late, as with data in object storage
        patch.setattr("lgm_scale.checkpoint.run_folder.input_problems", lambda *args: ())
        said = refusal(main, path, "model.num_classes=10")
    assert "has 17 classes, model.num_classes says 10: make them equal" in said
    assert (tmp_path / "run" / "config.json").exists()
    assert typed(main, path, "model.num_classes=17").status == 0


# --- changes on purpose ---------------------------------------------------------------------------


def test_a_longer_run_is_the_run_that_was_long_from_the_start(small_pipeline, finished, tmp_path):
    short = tmp_path / "short"
    path = config(small_pipeline, short)
    assert typed(main, path, "train.max_duration=4ba").status == 0
    assert "is finished" in typed(main, path, "train.max_duration=4ba").out
    assert "6 steps done" in typed(main, path).out
    assert losses(short, 6) == losses(finished, 6)
    weights, wanted = (load_file(r / "bundle/generator.safetensors") for r in (short, finished))
    assert all((weights[name] == value).all() for name, value in wanted.items())
    assert "is finished" in typed(main, path).out
    change, result = history(short)
    assert change["after_step"] == 4
    assert change["changes"] == {"train.max_duration": {"from": "4ba", "to": "6ba"}}
    assert result["result"] == "6ba"
    info = json.loads((short / "bundle" / "bundle.json").read_text())
    assert info["training"]["changes"] == [change]


def test_a_run_that_was_made_longer_is_not_finished_before_it_is(small_pipeline, finished, copy):
    shutil.copytree(finished / "bundle", copy / "bundle")  # as if the short run had ended
    record = (copy / "config.json").read_text()
    (copy / "config.json").write_text(record.replace('"6ba"', '"4ba"'))
    run = json.loads((copy / "state" / "run.json").read_text())
    run["config"]["train"]["max_duration"] = "4ba"
    (copy / "state" / "run.json").write_text(json.dumps(run))
    path = config(small_pipeline, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lgm_scale.build.export_bundle", killed)
        with pytest.raises(MemoryError):
            typed(main, path)
    assert "6 steps done" in typed(main, path).out
    assert losses(copy, 6) == losses(finished, 6)


def killed(*args: object) -> None:
    raise MemoryError


def test_a_run_in_object_storage_is_made_longer_from_another_machine(
    small_pipeline, finished, tmp_path, monkeypatch
):
    bucket = FarStorage(tmp_path / "bucket")
    monkeypatch.setattr("lgm_scale.checkpoint.run.open_storage", lambda *args: bucket)
    for name, steps in (("one", 4), ("two", 6)):
        path = config(small_pipeline, tmp_path / name)
        said = typed(main, path, f"train.max_duration={steps}ba")
        assert f"{steps} steps done" in said.out
    assert losses(tmp_path / "two", 6) == losses(finished, 6)
    path = config(small_pipeline, tmp_path / "three")
    assert "is finished" in typed(main, path).out
    assert history(tmp_path / "three")[0]["after_step"] == 4
    said = refusal(main, config(small_pipeline, tmp_path / "four"), "optimizer.lr=0.0005")
    assert "optimizer.lr: 0.001 there, 0.0005 here" in said


def test_a_duration_does_not_shrink(small_pipeline, finished):
    path = finished.with_suffix(".yaml")
    said = refusal(main, path, "train.max_duration=5ba")
    assert "train.max_duration: '6ba' there, '5ba' here" in said
    assert "may grow, in the same unit" in said


def test_a_new_learning_rate_needs_to_be_allowed_and_is_recorded(small_pipeline, copy, finished):
    path = config(small_pipeline, copy)
    said = refusal(main, path, "optimizer.lr=0.0005", "optimizer.weight_decay=0.1")
    assert "optimizer.lr: 0.001 there, 0.0005 here" in said
    (flags,) = re.findall(r"by adding `(.*)`", said)
    assert not (copy / "history.json").exists()
    words = ("optimizer.lr=0.0005", "optimizer.weight_decay=0.1")
    assert typed(main, path, *words, *shlex.split(flags)).status == 0
    assert [row["lr"] for row in metrics(copy)] == [0.001] * 4 + [0.0005] * 2
    assert losses(copy, 6)[:5] == losses(finished, 6)[:5]  # the step after the change sees it
    assert losses(copy, 6)[5] != losses(finished, 6)[5]
    (change,) = history(copy)[:1]
    assert change["after_step"] == 4
    assert change["changes"]["optimizer.lr"] == {"from": 0.001, "to": 0.0005}
    assert "is finished" in typed(main, path, *words).out  # the change is the run's own now
    assert "optimizer.lr: 0.0005 there, 0.001 here" in refusal(main, path)


@pytest.mark.slow
def test_a_resume_after_a_change_is_as_exact_as_any(small_pipeline, finished, tmp_path):
    words = ("optimizer.lr=0.0005", *ALLOW_LR, "train.max_duration=8ba")
    ends = []
    for name in ("whole", "interrupted"):
        out = rewound(finished, tmp_path / name, 4)
        path = config(small_pipeline, out)
        if name == "interrupted":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("lgm_scale.build.export_bundle", killed)
                with pytest.raises(MemoryError):
                    typed(main, path, *words)
            shutil.rmtree(next((out / "state").glob("ba00000008-*")))
        assert typed(main, path, *words).status == 0
        ends.append(losses(out, 8))
    assert ends[0] == ends[1]


def test_a_cosine_follows_its_new_length(small_pipeline, tmp_path):
    out = tmp_path / "cosine"
    path = config(
        small_pipeline, out, optimizer={"lr": 1e-3, "schedule": "cosine"},
        train=STEPS | {"max_duration": "2ba"},
    )  # fmt: skip
    assert typed(main, path).status == 0
    assert typed(main, path, "train.max_duration=4ba").status == 0
    rates = [row["lr"] for row in metrics(out)]
    assert rates[2:] == pytest.approx([5e-4, 1e-3 * (1 - 0.5**0.5) / 2])  # those of a run of 4


def test_keys_that_say_what_the_state_means_cannot_change(small_pipeline, finished):
    path = finished.with_suffix(".yaml")
    for word in ("seed=1", "objective.noise_scale=legacy", "ema.decay=0.5"):
        key = word.split("=")[0]
        said = refusal(main, path, word, "--allow-change", key, "train.max_duration=8ba")
        assert f"--allow-change {key}: it cannot change within a run; these can:" in said


def test_a_change_without_a_step_to_make_it_is_refused(small_pipeline, finished):
    said = refusal(main, finished.with_suffix(".yaml"), "optimizer.lr=0.0005", *ALLOW_LR)
    assert "changed, but the run is finished after 6ba; to go on, make" in said


def test_a_key_of_a_later_version_hides_no_younger_one(small_pipeline, copy):
    record = json.loads((copy / "config.json").read_text())
    del record["ema"]["interval"]  # written before there was this key
    record["optimizer"]["later"] = 1  # and by a version that we do not know yet
    (copy / "config.json").write_text(json.dumps(record))
    said = refusal(main, config(small_pipeline, copy))
    assert "optimizer.later: 1 there, None here" in said
    assert "ema.interval" not in said


def test_the_advice_after_a_nan_works(small_pipeline, copy, monkeypatch):
    path = config(small_pipeline, copy)
    check = FiniteGuard._check

    def nan_at_high_rates(self, values, state, *args):
        high = state.optimizers[0].param_groups[0]["lr"] > 0.0005
        check(self, {name: float("nan") if high else v for name, v in values.items()}, state, *args)

    monkeypatch.setattr(FiniteGuard, "_check", nan_at_high_rates)
    said = refusal(main, path)
    assert "step 4, K = 4: loss is nan" in said
    (advice,) = re.findall(r"add `(.*)` to go on", said)
    assert typed(main, path, *shlex.split(advice)).status == 0
    assert [row["lr"] for row in metrics(copy)][4:] == [0.0005] * 2


def test_the_advice_after_a_nan_works_before_the_first_state(small_pipeline, tmp_path, monkeypatch):
    path = config(small_pipeline, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(FiniteGuard, "_check", diverged)
        assert refusal(main, path).endswith("diverged\n")
    assert typed(main, path, "optimizer.lr=0.0005", *ALLOW_LR, "train.max_duration=2ba").status == 0


def diverged(self: FiniteGuard, *args: object) -> None:
    from lgm_scale.errors import DivergenceError

    raise DivergenceError("diverged")
