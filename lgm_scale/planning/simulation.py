"""The real training step as one rank of any number of ranks would run it, on one CPU.

Tensors have shapes and no numbers, and collectives return at once; the family's model, its losses,
sharding, autograd, clipping, optimizer and average are those of a run. What cannot be simulated:
DDP's and DeepSpeed's engines, which read numbers. Their step is that of one process, and what they
add to it follows from their rules (`lgm_scale.planning.strategies`).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # makes them known to fake tensors
from torch import nn

from lgm_scale.build import build_optimizer
from lgm_scale.config.schema import FSDPConfig, TrainingRun
from lgm_scale.families.base import family_of
from lgm_scale.layers import choose_attention
from lgm_scale.parallel.blocks import checkpoint_blocks, transformer_blocks
from lgm_scale.parallel.fsdp import shard_model
from lgm_scale.parallel.shards import local_shards
from lgm_scale.parallel.torch_internals import fake_tensors, join_fake_ranks
from lgm_scale.parallel.traffic import Traffic, Transfer
from lgm_scale.planning.recorder import Recorder, Work
from lgm_scale.training.clipping import GroupClipping
from lgm_scale.training.ema import EMA
from lgm_scale.training.model import Rehearsal
from lgm_scale.weights import Unfilled

LATE = 10**6
"""A step in which every loss is on, whatever comes in later than others."""


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Let this process be rank 0 of `world_size`; an earlier process group ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
    join_fake_ranks(world_size)
    try:
        # Composer compares the group with the environment, where it may have left its own words.
        with patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": str(world_size)}):
            yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Simulated:
    """A step of one rank, after an update that made the moments. Bytes.

    Args:
        state: Weights, moments, average and frozen networks, as they lie between two steps.
        live: Alive after each event of the step.
        activations: The same without state and gradients.
        passes: What each micro-batch but the last computes and moves, then the last.
        update: What clipping, optimizer and average compute and move.
        buffers: Elements and their size of all buffers together, by dtype.
    """

    state: int
    live: np.ndarray
    activations: np.ndarray
    passes: Sequence[Part]
    update: Part
    buffers: Sequence[tuple[int, int]]

    @property
    def peak(self) -> int:
        """Most that is alive at once."""
        return int(self.live.max())


@dataclass(frozen=True)
class Part:
    """What a stretch of a step computes, and what it moves."""

    work: Work
    transfers: Sequence[Transfer]


def simulate(
    config: TrainingRun,
    world_size: int,
    num_samples: int,
    num_tokens: int | tuple[int, ...],
    micro_batches: int = 1,
    as_gpu: bool = True,
) -> Simulated | None:
    """Simulate a step; None if the family cannot say what one is without data.

    Under `parallel.strategy: fsdp` the model is sharded over `world_size` ranks; any other strategy
    is one process.

    Args:
        config: The run.
        world_size: Ranks that share the model.
        num_samples: Samples of a micro-batch.
        num_tokens: K of the step, or of each sample.
        micro_batches: How many make the step; more than two cost what the second costs.
        as_gpu: Take the forms that a GPU takes: attention by an extra channel, fused AdamW,
            gradients reduced in float32. Else those of the CPU.
    """
    with torch.device("meta"), Unfilled():
        most = num_tokens if isinstance(num_tokens, int) else max(num_tokens)
        rehearsal = family_of(config).rehearsal(config, num_samples, most)
    if rehearsal is None:
        return None
    with ExitStack() as stack:
        stack.enter_context(fake_ranks(world_size))
        if as_gpu:
            choose_attention(rehearsal.model, "channel")
        _shard(config, rehearsal.model, as_gpu)
        stack.enter_context(fake_tensors())
        return _run(config, rehearsal, num_samples, num_tokens, min(micro_batches, 2), as_gpu)


def _shard(config: TrainingRun, model: nn.Module, as_gpu: bool) -> None:
    parallel = config.parallel
    checkpoint_blocks(transformer_blocks(model), parallel.activation_checkpointing)
    if parallel.strategy == "fsdp":
        half = config.train.precision == "amp_bf16"
        compute = torch.bfloat16 if half else torch.float32
        shard_model(model, parallel.fsdp or FSDPConfig(), compute, as_gpu or None)


def _run(
    config: TrainingRun,
    rehearsal: Rehearsal,
    num_samples: int,
    num_tokens: int | tuple[int, ...],
    passes: int,
    as_gpu: bool,
) -> Simulated:
    model, recorder, traffic = rehearsal.model, Recorder(), Traffic()
    groups = model.parameter_groups()
    half = config.train.precision == "amp_bf16"
    with recorder, traffic:
        for part in (model, *rehearsal.frozen):
            part.to_empty(device="cpu")
        optimizer = build_optimizer(config.optimizer, groups)
        for group in optimizer.param_groups if as_gpu else ():
            group["fused"] = True
        ema = EMA(config.ema.decay)
        ema.start(local_shards(model, optimizer))
        norm = config.optimizer.clip_norm
        clipping = None if norm is None else GroupClipping(groups, norm, model.record)
        now: Any = SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=1)))

        def part_of_step() -> Part:
            moved, traffic.transfers = traffic.transfers, []
            return Part(recorder.take_work(), moved)

        def micro_batch() -> Part:
            batch = _batch(config, rehearsal, num_samples, num_tokens)
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                outputs = model(batch)
                loss: Any = model.loss(outputs, batch)
            loss.backward()
            return part_of_step()

        def update() -> Part:
            gradients.update(recorder.serials(p.grad for p in _with_gradients(model)))
            if clipping is not None:
                clipping.apply(None, now, None)  # type: ignore[arg-type]  # it reads neither
            optimizer.step()
            ema.batch_end(now, None)  # type: ignore[arg-type]  # it logs nothing
            model.record.take()
            model.record.take_groups()
            optimizer.zero_grad()
            return part_of_step()

        gradients: set[int] = set()
        for p in model.parameters():  # a whole step before would make the same moments, and no more
            p.grad = torch.empty_like(p) if p.requires_grad else None
        update()
        gc.collect()
        gc.disable()  # what it frees, it frees at moments of its own choice
        try:
            first = len(recorder.events)
            done, updated = [micro_batch() for _ in range(passes)], update()
            kept = set(recorder.alive())
            state = int(recorder.timeline()[-1])
        finally:
            gc.enable()
    live = recorder.timeline(first)
    activations = recorder.timeline(first, kept | gradients)
    return Simulated(state, live, activations, done, updated, _buffers(model))


def _buffers(model: nn.Module) -> list[tuple[int, int]]:
    """Elements and their size of all buffers, by dtype."""
    found: dict[torch.dtype, int] = {}
    for buffer in model.buffers():
        found[buffer.dtype] = found.get(buffer.dtype, 0) + buffer.numel()
    return [(numel, dtype.itemsize) for dtype, numel in found.items()]


def _with_gradients(model: nn.Module) -> Iterator[Any]:
    return (p for p in model.parameters() if p.grad is not None)


def _batch(
    config: TrainingRun, rehearsal: Rehearsal, num_samples: int, num_tokens: int | tuple[int, ...]
) -> dict[str, Any]:
    """One batch as the loader and `training.callbacks.StepKeys` make it, without numbers."""
    batch: dict[str, Any] = {
        name: torch.empty(value.shape, dtype=value.dtype) for name, value in rehearsal.batch.items()
    }
    batch["sample_ids"] = torch.empty(num_samples, dtype=torch.int64)
    lengths: Any = num_tokens
    if isinstance(num_tokens, tuple):
        lengths = list(num_tokens)
    elif config.lengths.per_sample:
        lengths = torch.full((num_samples,), num_tokens)
    return batch | {"step": LATE, "num_tokens": lengths}
