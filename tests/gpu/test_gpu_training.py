"""What needs Composer, on a GPU: the whole step, guard, average, sharding on one rank, resumption.

Composer's own loop waits for the loss once in every step; our part of the step waits for nothing.
"""

# ruff: noqa: E402  # what may be missing is asked for before what needs it

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gpu_cases import CASES, CLASSES, TOKENS, TREE, no_waiting
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

WHEELS = "is missing: `make wheels-gpu` collects it (docs/gpu.md)"
pytest.importorskip("composer", reason=f"Composer {WHEELS}", exc_type=ImportError)
pytest.importorskip("streaming", reason=f"streaming {WHEELS}", exc_type=ImportError)

from small_pipeline import SmallPipeline, Steps, losses, train_in_process

from lgm_scale.build import build_optimizer
from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import DeepSpeedConfig, FSDPConfig, OptimizerConfig
from lgm_scale.errors import DivergenceError
from lgm_scale.families.base import family_of
from lgm_scale.families.lgm.config import LGMObjectiveConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.parallel.fsdp import shard_model
from lgm_scale.parallel.shards import ParameterShard, gather, local_shards
from lgm_scale.planning.simulation import simulate
from lgm_scale.training.clipping import GroupClipping
from lgm_scale.training.ema import EMA
from lgm_scale.training.guard import FiniteGuard
from lgm_scale.training.record import LossRecord

OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=1e-2)
TOLERANCE = 1e-5


@pytest.fixture
def used(device) -> torch.device:
    """The device that the package itself chooses: the GPU where there is one."""
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("the package takes the GPU")
    return device


@pytest.fixture
def one_rank(used) -> Iterator[torch.device]:
    """A process group of this process alone."""
    if dist.is_initialized():  # by an earlier test's trainer
        dist.destroy_process_group()
    backend = "nccl" if used.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield used
    dist.destroy_process_group()


def training_model(device: torch.device) -> LGMTrainingModel:
    """The same weights each time."""
    stats = LatentStats(torch.zeros(8), torch.ones(8))
    return LGMTrainingModel(CASES["lgm"].network(), TREE, stats, LGMObjectiveConfig(), 0).to(device)


def batch(step: int, device: torch.device) -> dict[str, Any]:
    latents = torch.randn(4, TOKENS, 8, generator=torch.Generator().manual_seed(step))
    return {
        "latents": latents.to(device),
        "labels": (torch.arange(4) % CLASSES).to(device),
        "sample_ids": torch.arange(4, device=device),
        "step": step,
        "num_tokens": (16, TOKENS)[step % 2],
    }


def now(step: int, num_tokens: int = 16) -> Any:
    """As much of Composer's state as our callbacks read."""
    timestamp = SimpleNamespace(batch=SimpleNamespace(value=step))
    return SimpleNamespace(timestamp=timestamp, batch={"num_tokens": num_tokens})


def test_our_part_of_a_step_waits_for_nothing_but_the_guards_copy(used):
    model = training_model(used)
    optimizer = build_optimizer(OPTIMIZER, model.parameter_groups())
    clipping = GroupClipping(model.parameter_groups(), 1.0, model.record)
    guard, ema = FiniteGuard(model.record, "Advice."), EMA(0.9)
    ema.start(local_shards(model, optimizer))
    everything: Any = None
    expected = [a.clone() for a in ema.average]

    def step(number: int, given: dict[str, Any]) -> None:
        loss = model.loss(model(given), given)
        guard.after_loss(now(number), everything)
        loss.backward()
        guard.after_train_batch(now(number), everything)
        clipping.apply(everything, now(number), everything)
        optimizer.step()
        optimizer.zero_grad()
        ema.batch_end(now(number + 1), everything)
        for mean, shard in zip(expected, ema.shards, strict=True):
            mean.lerp_(shard.weight(), 0.1)

    given = [batch(number, used) for number in range(6)]
    for number in range(2):
        step(number, given[number])
    with no_waiting(used):
        for number in range(2, 6):
            step(number, given[number])
    assert all(torch.isfinite(value) for value in model.record.take().values())
    for mean, wanted in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(mean, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_guard_stops_before_the_step(used, bad):
    record = LossRecord()
    guard, nothing = FiniteGuard(record, "Advice."), now(0)
    record.add(4, {"loss": torch.tensor(1.0, device=used)})
    guard.after_loss(now(3), nothing)
    guard.after_train_batch(now(3), nothing)
    record.add(4, {"loss": torch.tensor(bad, device=used)})
    guard.after_loss(now(4), nothing)
    with pytest.raises(DivergenceError, match=r"step 4, K = 16: loss is (nan|inf).*before"):
        guard.after_train_batch(now(4), nothing)


def trained(model: Any, device: torch.device, call: Any, backward_and_step: Any) -> list[float]:
    """Losses of four steps."""
    values = []
    for number in range(4):
        given = batch(number, device)
        loss = model.loss(call(given), given)
        backward_and_step(loss)
        values.append(loss.item())
    return values


def whole(shards: list[ParameterShard]) -> dict[str, Tensor]:
    return dict(gather(shards, [shard.weight() for shard in shards]))


def plain(device: torch.device) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights without any strategy."""
    model = training_model(device)
    optimizer = build_optimizer(OPTIMIZER, model.parameter_groups())
    values = trained(model, device, model, lambda loss: _step(loss, optimizer))
    return values, whole(local_shards(model, optimizer))


def _step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same(found: tuple[list[float], dict[str, Tensor]], device: torch.device) -> None:
    values, weights = plain(device)
    assert values[0] != values[-1]
    torch.testing.assert_close(found[0], values, rtol=TOLERANCE, atol=0)
    assert found[1].keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[1][name], value, rtol=TOLERANCE, atol=TOLERANCE)


def test_fsdp_on_one_rank_is_no_strategy(one_rank):
    model = training_model(one_rank)
    shard_model(model, FSDPConfig(), torch.float32)
    optimizer = build_optimizer(OPTIMIZER, model.parameter_groups())
    values = trained(model, one_rank, model, lambda loss: _step(loss, optimizer))
    assert_same((values, whole(local_shards(model, optimizer))), one_rank)


@pytest.mark.slow
def test_zero_on_one_rank_is_no_strategy(one_rank, monkeypatch):
    """All stages in one process group: DeepSpeed remembers its first one."""
    pytest.importorskip("deepspeed", reason=f"DeepSpeed {WHEELS}", exc_type=ImportError)
    from lgm_scale.parallel.deepspeed import settings, start_engine
    from lgm_scale.parallel.deepspeed_internals import zero_shards

    monkeypatch.setenv("LOCAL_RANK", "0")  # as a launcher would
    # Stage 3 replaces it for good, by one that rounds otherwise: later tests compare bits.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    for stage in (1, 2, 3):
        model = training_model(one_rank)
        optimizer = build_optimizer(OPTIMIZER, model.parameter_groups())
        configuration = settings(DeepSpeedConfig(stage=stage), None, bf16=False)
        engine = start_engine(model, optimizer, configuration)
        values = trained(model, one_rank, engine, partial(_engine_step, engine))
        assert_same((values, whole(zero_shards(engine, model))), one_rank)


def _engine_step(engine: Any, loss: Tensor) -> None:
    loss.backward()
    engine.step()


def run_of(tmp_path: Path, big: bool) -> Any:
    """A run of ELIT on pixels: of size S in bfloat16 on a GPU, else tiny."""
    interface = {"split": "declared", "group_size": 4, "position_rows": 256}
    path = SmallPipeline(tmp_path).elit_config(
        tmp_path / "run",
        model={"size": "s" if big else "tiny", "patch_size": 2, "interface": interface},
        lengths={"choices": [256, 128]},
        train={
            "max_duration": "1ba", "global_batch_size": 64,
            "precision": "amp_bf16" if big else "fp32",
        },
    )  # fmt: skip
    return load_training_run(str(path), [], 1, has_gpu=big)


def test_a_step_takes_the_memory_that_was_planned(used, tmp_path):
    """What tensors take. What the driver, libraries and an allocator's gaps take is no part of it.

    On a CPU nothing counts memory: there, plan and step are seen to run.
    """
    on_gpu = used.type == "cuda"
    config, num_tokens = run_of(tmp_path, on_gpu), 128
    samples = 64 if on_gpu else 2
    plan = simulate(config, 1, samples, num_tokens, as_gpu=on_gpu)
    assert plan is not None
    assert plan.peak > plan.state > 0
    gc.collect()
    before = torch.cuda.memory_allocated(used) if on_gpu else 0
    rehearsal = family_of(config).rehearsal(config, samples, num_tokens)
    assert rehearsal is not None
    model = rehearsal.model.to(used)
    optimizer = build_optimizer(config.optimizer, model.parameter_groups())
    ema = EMA(config.ema.decay)
    ema.start(local_shards(model, optimizer))
    given = {name: torch.zeros_like(value, device=used) for name, value in rehearsal.batch.items()}
    given["sample_ids"] = torch.arange(samples, device=used)
    everything: Any = None
    for step in range(3):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(used)
        whole_batch = given | {"step": step, "num_tokens": num_tokens}
        with torch.autocast(used.type, torch.bfloat16, enabled=on_gpu):
            loss = model.loss(model(whole_batch), whole_batch)
        loss.backward()
        optimizer.step()
        ema.batch_end(now(step + 1), everything)
        optimizer.zero_grad()
    assert torch.isfinite(loss)
    if on_gpu:
        taken = torch.cuda.max_memory_allocated(used) - before
        assert taken == pytest.approx(plan.peak, rel=0.1)


@pytest.fixture
def pictures(tmp_path) -> SmallPipeline:
    """Sixteen random images of two classes, as a data set."""
    from lgm_scale.data.preparation.convert import convert_folder

    random = np.random.default_rng(0)
    for index in range(16):
        path = tmp_path / "photos" / f"class_{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    pipeline = SmallPipeline(tmp_path)
    convert_folder(tmp_path / "photos", pipeline.images, 32)
    return pipeline


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(used, pictures):
    """With deterministic kernels: attention's backward pass adds in any order by default."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        done, stopped = (
            pictures.elit_config(
                pictures.root / name,
                train={"max_duration": "6ba", "global_batch_size": 8, "precision": "fp32"},
                checkpoint={"interval": "2ba"},
            )
            for name in ("done", "stopped")
        )
        two = "model.num_classes=2"
        train_in_process(done, two)
        with pytest.raises(KeyboardInterrupt):
            train_in_process(stopped, two, on_step=Steps(stop=3))
        train_in_process(stopped, two)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    runs: list[Path] = [done.with_suffix(""), stopped.with_suffix("")]
    attempts = sorted((runs[1] / "state" / "attempts").iterdir())
    assert json.loads(attempts[-1].read_text())["resumed_step"] == 2
    assert losses(runs[0], 6) == losses(runs[1], 6)
    weights, others = (load_file(run / "bundle" / "generator.safetensors") for run in runs)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name
