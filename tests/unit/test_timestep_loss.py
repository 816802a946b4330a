"""The loss by timestep: sums and counts over micro-batches and ranks, in lines and loggers."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_training import generator_model, latent_batch, part

from lgm_scale.training import callbacks
from lgm_scale.training.callbacks import MetricsLog
from lgm_scale.training.flow_model import TIMESTEP_BINS, timestep_bins
from lgm_scale.training.record import LossRecord


class Loggers:
    def __init__(self) -> None:
        self.rows: list[dict] = []

    def log_metrics(self, metrics: dict, step: int) -> None:
        self.rows.append({"step": step} | metrics)


def state_at(step: int) -> SimpleNamespace:
    """After `step`: the timestamp has advanced."""
    return SimpleNamespace(
        batch={"num_tokens": 8},
        timestamp=SimpleNamespace(batch=SimpleNamespace(value=step + 1)),
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
    )


def test_bins_cover_the_unit_interval():
    t = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.75, 1.0])
    assert timestep_bins(t).tolist() == [0, 0, 1, 2, 3, 3]
    assert TIMESTEP_BINS == (
        "loss/t=0.00-0.25", "loss/t=0.25-0.50", "loss/t=0.50-0.75", "loss/t=0.75-1.00",
    )  # fmt: skip


def test_bins_are_what_their_samples_lost_whatever_the_micro_batch():
    model, batch = generator_model(), latent_batch(size=12)
    out = model(batch)
    loss = model.loss(out, batch)
    assert model.record.take()["loss"].item() == loss.item()
    whole = model.record.take_groups()
    assert sum(pair[1].item() for pair in whole.values()) == 12
    total = sum(pair[0].item() for pair in whole.values())
    assert total / 12 == pytest.approx(loss.item(), rel=1e-5)
    error = (out.v_pred - out.v_target).square().mean(-1) * out.assignment.sizes * 8 / 16
    inside = (out.t >= 0.25) & (out.t < 0.5)
    pair = whole["loss/t=0.25-0.50"]
    assert pair[1].item() == inside.sum().item() > 0
    assert (pair[0] / pair[1]).item() == pytest.approx(error.mean(-1)[inside].mean().item(), 1e-4)
    for first in (0, 4, 8):
        item = part(batch, slice(first, first + 4))
        model.loss(model(item), item)
    split = model.record.take_groups()
    assert split.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-5, atol=1e-5)
    assert model.record.take_groups() == {}


def test_a_nan_stays_in_its_bin():
    record = LossRecord()
    record.add_groups(("a", "b"), torch.tensor([0, 1]), torch.tensor([math.nan, 2.0]))
    groups = record.take_groups()
    assert groups["b"].tolist() == [2.0, 1.0]
    assert math.isnan(groups["a"][0])


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """Run steps of (t-bin, losses) through a log; the other rank's sums come from `other`."""

    def run(steps, other=None):
        record, loggers = LossRecord(), Loggers()
        log = MetricsLog(tmp_path / "metrics.jsonl", len(steps), record)
        reductions = []
        if other is not None:
            monkeypatch.setattr(callbacks.dist, "get_world_size", lambda: 2)
            monkeypatch.setattr(callbacks, "on_rank_zero", lambda work: work())  # no group is there
            monkeypatch.setattr(
                callbacks.dist,
                "all_reduce",
                lambda x: (reductions.append(x), x.add_(torch.tensor(other[len(reductions) - 1]))),
            )
        log._run, log._clock = (None, loggers), 0.0  # type: ignore[assignment]
        for step, (bins, losses) in enumerate(steps):
            losses = torch.tensor(losses)
            record.add(len(losses), {"loss": losses.mean()})
            record.add_groups(("loss/t=lo", "loss/t=hi"), torch.tensor(bins), losses)
            log.batch_end(state_at(step), loggers)  # type: ignore[arg-type]
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], loggers.rows

    return run


def test_a_part_without_samples_is_left_out(logged):
    rows, sent = logged([([0, 0, 1], [1.0, 2.0, 6.0]), ([1, 1, 1], [1.0, 2.0, 3.0])])
    assert [row["loss"] for row in rows] == [3.0, 2.0]
    assert (rows[0]["loss/t=lo"], rows[0]["loss/t=hi"]) == (1.5, 6.0)
    assert "loss/t=lo" not in rows[1]
    assert rows[1]["loss/t=hi"] == 2.0
    parts = {"loss/K=8/t=lo": 1.5, "loss/K=8/t=hi": 6.0}
    whole = {"loss/K=8": 3.0, "train/loss": 3.0, "train/lr": 0.1}
    assert sent[0] == {"step": 0, **whole, **parts}
    whole = {"loss/K=8": 2.0, "train/loss": 2.0, "train/lr": 0.1}
    assert sent[1] == {"step": 1, **whole, "loss/K=8/t=hi": 2.0}


def test_ranks_add_sums_and_counts_not_means(logged):
    # This rank has no low sample; the other has two low ones (1, 2) and one high one (9).
    rows, _ = logged([([1, 1, 1], [1.0, 2.0, 3.0])], other=([4.0], [3.0, 2.0, 9.0, 1.0]))
    assert rows[0]["loss"] == 3.0
    assert rows[0]["loss/t=lo"] == 1.5
    assert rows[0]["loss/t=hi"] == 15.0 / 4
