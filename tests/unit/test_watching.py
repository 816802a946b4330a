"""What a run reports, and where: loggers, resources, the console; what cannot be watched."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Time, Timestamp
from composer.utils import dist
from small_tokenizer import small_batch, small_model

from lgm_scale.build import build_scheduler
from lgm_scale.config.inputs import input_problems
from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import OptimizerConfig
from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.during_training.subjects import shown_lengths
from lgm_scale.evaluation.during_training.watching import BATCH_SIZE, Reconstructions, Watch
from lgm_scale.families.tokenizer.config import TokenizerObjectiveConfig
from lgm_scale.pixels import psnr
from lgm_scale.training.callbacks import MetricsLog, _bar
from lgm_scale.training.loggers import STEP, WandB
from lgm_scale.training.record import LossRecord
from lgm_scale.training.throughput import Resources

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER, GENERATOR = "yamls/quickstart/tokenizer.yaml", "yamls/quickstart/dit.yaml"


class Log:
    """A logger that keeps what it is told, by step."""

    def __init__(self) -> None:
        self.metrics: dict[int | None, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.setdefault(step, {}).update(metrics)


# --- Weights & Biases -------------------------------------------------------------------------


class Run:
    """A run of wandb, which keeps rows as wandb does: a row for each call."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.rows, self.axes, self.finished = settings, [], {}, 0

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        assert step is None, "wandb drops values of a step before its last one"
        self.rows.append(values)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def runs(monkeypatch) -> list[Run]:
    """Runs that a module in the place of wandb has begun."""
    module: Any = ModuleType("wandb")
    begun: list[Run] = []
    module.init = lambda **settings: begun.append(Run(**settings)) or begun[-1]
    module.Image = lambda image: image
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


def test_wandb_keeps_numbers_of_earlier_steps(runs):
    """The numbers of an interval come when the trainer has told later steps already."""
    logger, nothing = WandB("p", "run"), SimpleNamespace()
    logger.init(nothing, nothing)  # type: ignore[arg-type]
    (run,) = runs
    assert run.settings == {"project": "p", "name": "run"}
    assert run.axes == {STEP: None, "*": STEP}
    logger.log_metrics({"time/batch": 3}, step=3)
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0 - step}, step=step)
    losses = [(row[STEP], row["train/loss"]) for row in run.rows if "train/loss" in row]
    assert losses == [(0, 1.0), (1, 0.0), (2, -1.0)]
    logger.log_images(np.zeros((4, 6, 3), np.uint8), "pictures/samples", True, 3, None, None, False)
    assert run.rows[-1].keys() == {STEP, "pictures/samples"}
    assert run.rows[-1][STEP] == 3
    assert run.rows[-1]["pictures/samples"].shape == (4, 6, 3)


@pytest.mark.parametrize("fitted", [True, False])
def test_a_run_that_failed_is_not_said_to_be_finished(runs, fitted):
    """wandb's own hook at the end of the process says that it failed, and with which status."""
    logger, nothing = WandB("p", "run"), SimpleNamespace()
    logger.init(nothing, nothing)  # type: ignore[arg-type]
    if fitted:
        logger.fit_end(nothing, nothing)  # type: ignore[arg-type]
    logger.post_close()
    logger.post_close()  # at the end of the process once more
    assert runs[0].finished == int(fitted)


# --- numbers and lines ------------------------------------------------------------------------


def log_of(tmp_path, record: LossRecord, interval: int, **options: Any) -> MetricsLog:
    return MetricsLog(tmp_path / "metrics.jsonl", interval, record, **options)


def state_at(step: int) -> Any:
    """A trainer's state at the end of a step, whose timestamp has advanced."""
    return SimpleNamespace(
        batch={"num_tokens": 8},
        timestamp=SimpleNamespace(batch=Time(step + 1, "ba")),
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.5**step}])],
    )


def run_steps(callback: MetricsLog, record: LossRecord, losses: list[float]) -> Log:
    log: Any = Log()
    callback.fit_start(state_at(-1), log)
    for step, loss in enumerate(losses):
        record.add(4, {"loss": torch.tensor(loss), "entropy": torch.tensor(-3.0)})
        record.note("gradient_norm_generator", torch.tensor(2.0 + step))
        callback.batch_end(state_at(step), log)
    return log


def test_loggers_get_every_number_of_every_step_at_the_end_of_an_interval(tmp_path):
    record = LossRecord()
    log = run_steps(log_of(tmp_path, record, 2), record, [1.0, 0.5, 0.25])
    assert log.metrics == {
        step: {
            "loss/K=8": loss, "train/loss": loss, "train/entropy": -3.0, "train/lr": 0.5**step,
            "train/gradient_norm_generator": 2.0 + step,
        }
        for step, loss in enumerate([1.0, 0.5])
    }  # fmt: skip


def test_the_console_says_once_what_a_negative_loss_means(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lgm_scale")
    record, said = LossRecord(), "a loss below 0 is no error"
    callback = log_of(tmp_path, record, 1, below_zero=said)
    run_steps(callback, record, [0.5, -0.1, -0.2])
    lines = [entry.getMessage() for entry in caplog.records]
    assert lines.count(said) == 1
    assert lines.index(said) == 2, "after the line of the step where it happened"


def test_the_page_on_watching_explains_every_term_of_a_tokenizer():
    model, page = small_model(), (ROOT / "docs" / "watching.md").read_text()
    batch = small_batch(step=3)
    model.loss(model.forward(batch), batch)
    terms = set(model.record.take())
    assert {"critic_lecam", "adaptive_weight", "representation", "perceptual"} <= terms
    assert [name for name in terms if f"`train/{name}`" not in page] == []


def test_a_tokenizer_names_the_terms_that_may_be_negative():
    said = small_model().below_zero()
    assert "entropy (from -" in said
    assert "representation (a cosine, from -1 on)" in said
    assert "adversarial" in said
    plain = TokenizerObjectiveConfig(entropy=0.0)
    assert small_model(plain).below_zero() == ""


def test_waiting_and_memory_are_reported_once_an_interval(monkeypatch):
    waits, clock = iter([5.0, 5.5]), iter([100.0, 110.0])
    monkeypatch.setattr("lgm_scale.training.throughput.time.perf_counter", lambda: next(clock))
    callback, log = Resources(4, lambda: next(waits)), Log()
    state: Any = None
    callback.fit_start(state, log)  # type: ignore[arg-type]
    for _ in range(4):
        assert log.metrics == {}
        callback.batch_end(state, log)  # type: ignore[arg-type]
    report = log.metrics[None]
    assert report["data/wait_seconds"] == pytest.approx(0.5 / 4)
    assert report["data/wait_share"] == pytest.approx(0.05)
    assert 0.05 < report["memory/host_gib"] < 64
    assert ("memory/gpu_peak_gib" in report) == torch.cuda.is_available()


def test_a_bar_that_nobody_reads_does_not_end_a_run(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stream)
    limit = Time(100, "ba")
    state: Any = SimpleNamespace(max_duration=limit, timestamp=SimpleNamespace(batch=Time(0, "ba")))
    bar = _bar(state)
    for _ in range(100):
        bar.update()
    bar.close()
    assert bar.disable
    monkeypatch.undo()
    with pytest.raises(BrokenPipeError):  # the pipe was broken indeed
        stream.close()


def test_no_warm_up_is_no_mistake():
    """Composer warns of it at every start and every resume."""
    state: Any = SimpleNamespace(
        timestamp=Timestamp(batch=3),
        max_duration=Time(10, "ba"),
        dataloader_len=Time(5, "ba"),
        stop_training=False,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        schedule = build_scheduler(OptimizerConfig(schedule="cosine", warmup=0))
        assert 0 < schedule(state) < 1
    assert told == []


# --- what is shown, and what cannot be ----------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "shown"),
    [
        ([64], [64]),
        ([8, 64], [8, 64]),
        ([8, 16, 32, 64], [8, 16, 32, 64]),
        ([32, 48, 64, 96, 128, 196, 256], [32, 64, 128, 256]),
        (list(range(16, 257, 16)), [16, 96, 176, 256]),
    ],
)
def test_pictures_show_four_lengths_from_the_smallest_to_the_largest(lengths, shown):
    assert shown_lengths(lengths) == shown


class Looks(Watch):
    """Notes the steps at which it looks."""

    def __init__(self, interval: str) -> None:
        super().__init__(interval)
        self.steps: list[int] = []

    def look(self, step: int, logger: Any = None) -> None:
        self.steps.append(step)


@pytest.mark.parametrize(
    ("interval", "steps"), [("4ba", [4, 8, 12]), ("1ep", [5, 10]), ("2ep", [10])]
)
def test_looks_come_at_whole_intervals(interval, steps):
    looks, log = Looks(interval), Log()
    for step in range(1, 13):  # five steps an epoch
        state: Any = SimpleNamespace(timestamp=Timestamp(batch=step, epoch=step // 5))
        looks.batch_end(state, log)  # type: ignore[arg-type]
        if step % 5 == 0:
            looks.epoch_end(state, log)  # type: ignore[arg-type]
    assert looks.steps == steps


class Stored:
    """Images in memory."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: list[int]) -> tuple[torch.Tensor, None]:
        return self.images[indices], None


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_measure_every_image_once(monkeypatch, world_size):
    """Whatever the number of ranks, the PSNR is that of the images in their order."""
    images = torch.randint(0, 256, (37, 3, 4, 4), dtype=torch.uint8)
    subject: Any = SimpleNamespace(
        lengths=[4, 8],
        images=Stored(images),
        tree=lambda: None,
        reconstructed=lambda batch, tree, lengths: [batch // 2, batch],
    )
    looks = Reconstructions("1ep", subject, 37)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    found = {}
    for rank in range(world_size):
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        part = looks._measured(range(0, 37, BATCH_SIZE))
        assert not found.keys() & part.keys()
        found |= part
    measured = [value for start in sorted(found) for value in found[start][0]]
    assert measured == psnr(images, images // 2).tolist()


def problems(path: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_training_run(path, list(overrides), 1, has_gpu=False)
    return caught.value.problems


def test_images_that_are_not_there_are_told_with_all_else(tmp_path):
    watched = [f"evaluation.images={tmp_path}/none", "evaluation.interval=1ep"]
    overrides = [*watched, f"data.path={tmp_path}/gone"]
    run = load_training_run(TOKENIZER, overrides, 1, has_gpu=False)
    told = list(input_problems(run))
    assert [line.split(":")[0] for line in told] == ["evaluation.images", "data.path"]
    to_come = f"{tmp_path}/none"
    assert [line.split(":")[0] for line in input_problems(run, lambda path: path == to_come)] == [
        "data.path"
    ]


def test_what_cannot_be_watched_is_told_with_a_fix():
    (problem,) = problems(TOKENIZER, "logging.pictures=100ba")
    assert problem.startswith("logging.pictures: 100ba asks for pictures of validation images")
    fix = ["evaluation.images=x", "evaluation.interval=100ba"]
    load_training_run(TOKENIZER, ["logging.pictures=100ba", *fix], 1, has_gpu=False)
    (problem,) = problems(TOKENIZER, *fix, "evaluation.num_images=0")
    assert problem.startswith("evaluation.num_images: 0 must be")
    found = problems(TOKENIZER, "evaluation.images=x", "evaluation.interval=often")
    assert [line.split(":")[0] for line in found] == ["evaluation.interval"]
    found = problems(GENERATOR, "logging.pictures=often")
    assert [line.split(":")[0] for line in found] == ["logging.pictures"]
    lora = ["lora.base=x", "lengths.choices=[64]"]
    (problem,) = problems(GENERATOR, *lora, "logging.pictures=1ep")
    assert problem.startswith("logging.pictures: is for runs that train a whole generator")
    load_training_run(GENERATOR, lora, 1, has_gpu=False)
