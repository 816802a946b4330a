"""Training on a grid: which way time runs, what a visit of an image draws, what it depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lgm_scale.config.schema import FlowObjectiveConfig
from lgm_scale.families.elit.network import ELIT
from lgm_scale.families.elit.training import ELITTrainingModel
from lgm_scale.pixels import PIXEL_STD

SCALE = 0.18215


def latents(ids: list[int], step: int = 3, num_tokens: int = 8) -> dict[str, Any]:
    """A batch of moments that depend on the sample alone."""
    made = [torch.Generator().manual_seed(i) for i in ids]
    return {
        "mean": torch.stack([torch.randn(4, 8, 8, generator=g) for g in made]).half(),
        "std": torch.stack([torch.rand(4, 8, 8, generator=g) for g in made]).half(),
        "labels": torch.tensor([i % 5 for i in ids]),
        "sample_ids": torch.tensor(ids),
        "step": step,
        "num_tokens": num_tokens,
    }


def elit(channels: int = 4) -> ELIT:
    torch.manual_seed(0)
    net = ELIT(
        32, 3, 4, channels, 8, 2, 5, head_blocks=1, tail_blocks=1, group_size=2, position_rows=16
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.15)
    return net


def model(net: Any = None, scale: float | None = SCALE, dropout: float = 0.1) -> ELITTrainingModel:
    return ELITTrainingModel(
        net or elit(), scale, FlowObjectiveConfig(label_dropout=dropout), seed=7
    )


class Oracle(nn.Module):
    """Knows the data: the velocity from z_t to it, in our convention."""

    null_label = 5

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.data = data
        self.asked: list[tuple[Tensor, int]] = []

    def forward(self, z_t: Tensor, t: Tensor, labels: Tensor, num_tokens: int) -> Tensor:
        self.asked.append((labels, num_tokens))
        return (self.data - z_t) / (1 - t).view(-1, 1, 1, 1)


def test_the_flow_ends_at_the_data():
    """At t = 1 there is no noise left, and whoever knows the data predicts the target."""
    batch = latents(list(range(6)))
    data = model().state(batch)
    shell = model(Oracle(data))
    outputs = shell(batch)
    torch.testing.assert_close(outputs.v_pred, outputs.v_target, atol=1e-4, rtol=1e-4)
    assert float(shell.loss(outputs, batch)) < 1e-8
    assert shell.net.asked[0][1] == 8  # type: ignore[union-attr]


def test_a_visit_draws_a_latent_of_the_stored_distribution():
    batch, shell = latents([1, 2]), model()
    draws = torch.stack([shell.state(batch | {"step": step}) for step in range(1000)]) / SCALE
    mean, std = batch["mean"].float(), batch["std"].float()
    error = (draws.mean(0) - mean).abs() / (std / 1000**0.5).clamp_min(1e-3)
    assert error.max() < 5  # of 512 values
    torch.testing.assert_close(draws.std(0), std, atol=0.1, rtol=0.1)


def test_a_sample_does_not_depend_on_its_batch():
    shell, whole = model(), latents([3, 5, 8, 13])
    together = shell(whole)
    for i, sample in enumerate((3, 5, 8, 13)):
        alone = shell(latents([sample]))
        torch.testing.assert_close(alone.v_target[0], together.v_target[i], atol=1e-6, rtol=0)
        torch.testing.assert_close(alone.v_pred[0], together.v_pred[i], atol=1e-4, rtol=0)
        assert torch.equal(alone.t[0], together.t[i])


@pytest.mark.parametrize("change", [{"step": 4}, {"sample_ids": torch.tensor([2, 1])}])
def test_another_step_or_sample_draws_anew(change):
    first, second = (model()(latents([1, 2]) | extra) for extra in ({}, change))
    assert not torch.equal(first.v_target, second.v_target)
    assert not torch.equal(first.t, second.t)


def test_noise_does_not_depend_on_the_budget():
    first, second = (model()(latents([1, 2], num_tokens=k)) for k in (4, 16))
    assert torch.equal(first.v_target, second.v_target)
    assert not torch.equal(first.v_pred, second.v_pred)


def test_pixels_are_the_state_themselves():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    state = model(elit(3), None).state({"images": images})
    expected = torch.tensor([-1.0, 1.0, -0.6]) / PIXEL_STD
    torch.testing.assert_close(state[0, :, 0, 0], expected, atol=1e-6, rtol=0)


def test_label_dropout_gives_the_null_label():
    batch = latents(list(range(400)))
    oracle = Oracle(torch.zeros(()))
    model(oracle, dropout=0.25)(batch)
    labels = oracle.asked[0][0]
    dropped = labels == 5
    assert 0.15 < dropped.float().mean() < 0.35
    assert torch.equal(labels[~dropped], batch["labels"][~dropped])


def test_the_loss_is_the_mean_squared_error_and_is_noted_by_time():
    shell, batch = model(), latents(list(range(8)))
    outputs = shell(batch)
    loss = shell.loss(outputs, batch)
    expected = (outputs.v_pred - outputs.v_target).square().mean()
    torch.testing.assert_close(loss, expected)
    assert sum(float(pair[1]) for pair in shell.record.take_groups().values()) == 8
