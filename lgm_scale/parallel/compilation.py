"""What `train.compile: auto` comes to: one answer for all ranks, before anything is recorded."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lgm_scale.config.schema import TrainingRun
from lgm_scale.layers import Attention, DiTBlock, SwiGLU
from lgm_scale.parallel.collectives import first_of_ranks

log = logging.getLogger("lgm_scale")


def settle_compile(
    config: TrainingRun, begun: bool | None, reason: str | None
) -> tuple[TrainingRun, TrainingRun]:
    """The configuration with `auto` settled: as it is recorded, and as this start computes.

    They differ where a run began compiled and a compiler fails here: it goes on without, and one
    line says so. The compiler is tried on every rank, and if it fails on one, none compiles: ranks
    that compute one step in two ways would differ in its last digits. Every rank must call it.

    Args:
        config: The run.
        begun: Whether the run that goes on here was compiled; None for a new one.
        reason: Why a new run is not compiled though it is on GPUs; None if it is.
    """
    if config.train.compile != "auto":
        return config, config
    on_gpu = torch.cuda.is_available()
    wanted = on_gpu and reason is None if begun is None else begun
    if begun is None and on_gpu and reason is not None:
        _say(reason)
    problem = first_of_ranks(_problem_here()) if wanted else None
    if problem is not None:
        _say(f"train.compile: auto is off, the compiler fails on {problem}")
    elif wanted:
        _say("train.compile: auto is on")
    runs = _with(config, wanted and problem is None)
    return (runs if begun is None else _with(config, begun)), runs


def compiler_problem(device: torch.device, **options: Any) -> str | None:
    """Why a small transformer block cannot be compiled, forward and backward; None if it can.

    Args:
        device: Where it runs.
        **options: For `torch.compile`.
    """
    try:
        with device:
            block = DiTBlock(64, Attention(64, 1), SwiGLU(64), nn.RMSNorm)
            inputs = torch.ones(1, 8, 64, requires_grad=True), torch.ones(1, 64), torch.zeros(8)
        block.compile(dynamic=False, **options)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            block(*inputs).sum().backward()
    except Exception as error:  # whatever a compiler may raise
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return words.split(" Set TORCHDYNAMO_VERBOSE")[0]  # from there on it is about logging
    finally:
        torch.compiler.reset()  # its graphs count against the limit of the run's own
    return None


def _problem_here() -> str | None:
    from composer.utils import dist  # late: what plans a run needs none of it

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = compiler_problem(device)
    return None if problem is None else f"rank {dist.get_global_rank()}: {problem}"


def _with(config: TrainingRun, compiled: bool) -> TrainingRun:
    return replace(config, train=replace(config.train, compile=compiled))


def _say(line: str) -> None:
    from composer.utils import dist  # late, as above

    if dist.get_global_rank() == 0:
        log.info(line)
