"""A loss that is no number stops the run before the weights change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from composer import Trainer
from composer.core import Callback, DataSpec
from small_tokenizer import OPTIMIZER, small_batch, small_model

from lgm_scale.build import build_optimizer
from lgm_scale.errors import DivergenceError
from lgm_scale.parallel.shards import local_shards
from lgm_scale.training.clipping import GroupClipping
from lgm_scale.training.ema import EMA
from lgm_scale.training.guard import FiniteGuard


class Poison(Callback):
    """At one step: make the reconstruction infinite, or a gradient NaN."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what
        self.parameters: list[torch.Tensor] = []
        self.before: list[torch.Tensor] = []

    def after_forward(self, state, logger) -> None:
        if state.timestamp.batch.value == self.step:
            self.parameters = list(state.model.parameters())
            self.before = [p.detach().clone() for p in self.parameters]
            if self.what == "loss":
                state.outputs = state.outputs._replace(
                    reconstruction=state.outputs.reconstruction * float("inf")
                )

    def after_backward(self, state, logger) -> None:
        if state.timestamp.batch.value == self.step and self.what == "gradient":
            state.model.net.to_latent.bias.grad.fill_(float("nan"))


def fit(tmp_path, poison: Poison):
    model = small_model()
    ema = EMA(0.5)
    optimizer = build_optimizer(OPTIMIZER, model.parameter_groups())
    ema.start(local_shards(model, optimizer))
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(
            [small_batch(step) for step in range(6)],
            get_num_samples_in_batch=lambda batch: len(batch["images"]),
        ),
        max_duration="6ba",
        optimizers=optimizer,
        algorithms=[GroupClipping(model.parameter_groups(), 1.0, model.record)],
        callbacks=[FiniteGuard(model.record, "Advice."), ema, poison],
        save_folder=str(tmp_path),
        save_filename="ba{batch}.pt",
        save_interval="1ba",
        device="cpu",
        device_train_microbatch_size=4,
        progress_bar=False,
    )
    try:
        trainer.fit()
    finally:
        trainer.close()
    return model, ema


def saved(tmp_path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("ba*.pt"))


def test_a_good_run_is_left_alone(tmp_path):
    fit(tmp_path, Poison(-1, "nothing"))
    assert len(saved(tmp_path)) == 6


def test_a_bad_loss_stops_before_the_step(tmp_path):
    poison = Poison(4, "loss")
    with pytest.raises(DivergenceError, match=r"step 4, K = 8: .*pixel is (nan|inf).*before") as e:
        fit(tmp_path, poison)
    assert "entropy" not in str(e.value)  # only what is bad
    assert str(e.value).endswith("Advice.")
    assert saved(tmp_path) == ["ba1.pt", "ba2.pt", "ba3.pt", "ba4.pt"]


def test_the_weights_have_not_moved(tmp_path):
    poison = Poison(4, "loss")
    with pytest.raises(DivergenceError):
        fit(tmp_path, poison)
    assert len(poison.before) == len(poison.parameters) > 0
    assert all(map(torch.equal, poison.before, poison.parameters))


def test_a_bad_gradient_stops_before_anything_is_saved(tmp_path):
    with pytest.raises(DivergenceError, match=r"step 2, K = 16: gradient_norm_generator is nan"):
        fit(tmp_path, Poison(2, "gradient"))
    assert saved(tmp_path) == ["ba1.pt", "ba2.pt"]


def test_a_batch_of_mixed_lengths_is_told_as_such():
    record = SimpleNamespace(latest={"loss": torch.tensor(float("inf"))})
    state = SimpleNamespace(
        batch={"num_tokens": torch.tensor([8, 16])},
        timestamp=SimpleNamespace(batch=SimpleNamespace(value=3)),
    )
    guard = FiniteGuard(record, "")  # type: ignore[arg-type]
    guard.after_loss(state, None)  # type: ignore[arg-type]
    with pytest.raises(DivergenceError, match="step 3, K = mixed: loss is inf"):
        guard.after_train_batch(state, None)  # type: ignore[arg-type]


def test_every_micro_batch_is_looked_at():
    record = SimpleNamespace(latest={"loss": torch.tensor(float("nan"))})
    state = SimpleNamespace(
        batch={"num_tokens": 8}, timestamp=SimpleNamespace(batch=SimpleNamespace(value=3))
    )
    guard = FiniteGuard(record, "")  # type: ignore[arg-type]
    guard.after_loss(state, None)  # type: ignore[arg-type]
    record.latest = {"loss": torch.tensor(1.0)}
    guard.after_loss(state, None)  # type: ignore[arg-type]
    with pytest.raises(DivergenceError, match="step 3, K = 8: loss is nan"):
        guard.after_train_batch(state, None)  # type: ignore[arg-type]
