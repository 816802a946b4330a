"""Rules for `parallel:` keys: between them, and between them and the number of ranks. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import version

from lgm_scale.config.schema import DeepSpeedConfig, TrainingRun


def parallel_rules(config: TrainingRun, world_size: int, has_gpu: bool | None) -> Iterator[str]:
    """One line, `key: value; rule; fix`, for each rule of `parallel:` that is broken.

    Args:
        config: The run.
        world_size: Number of ranks that will run it.
        has_gpu: Whether ranks have a GPU; None leaves the rules about it out (dry runs).
    """
    parallel = config.parallel
    sections = {"fsdp": parallel.fsdp, "deepspeed": parallel.deepspeed}
    given = [name for name, section in sections.items() if section is not None]
    if len(given) > 1:
        yield (
            "parallel.deepspeed: given beside parallel.fsdp; one strategy at a time: keep the "
            f"section of parallel.strategy ({parallel.strategy}) and drop the other"
        )
    elif given and given[0] != parallel.strategy:
        yield (
            f"parallel.{given[0]}: has no effect under parallel.strategy: {parallel.strategy}; "
            f"drop it, or set parallel.strategy: {given[0]}"
        )
    if not 0 <= parallel.activation_checkpointing <= 1:
        yield (
            f"parallel.activation_checkpointing: {parallel.activation_checkpointing} is a share of "
            "the blocks; it must be in [0, 1]"
        )
    if parallel.timeout_seconds < 1:
        yield f"parallel.timeout_seconds: {parallel.timeout_seconds} must be 1 or more"
    if parallel.strategy == "fsdp":
        yield from _fsdp(config, world_size, has_gpu)
    if parallel.strategy == "deepspeed":
        yield from _deepspeed(config)


def _fsdp(config: TrainingRun, world_size: int, has_gpu: bool | None) -> Iterator[str]:
    fsdp = config.parallel.fsdp
    if fsdp is None:
        return
    if fsdp.shard != "hybrid":
        if fsdp.group_size is not None:
            yield (
                f"parallel.fsdp.group_size: {fsdp.group_size} has no effect with shard: "
                f"{fsdp.shard}; drop it, or use hybrid"
            )
        return
    if has_gpu is False:
        yield (
            "parallel.fsdp.shard: hybrid needs a GPU (torch 2.7 waits for a CUDA event when it "
            "averages copies); use shard: full here"
        )
    if fsdp.group_size is None:
        return
    if world_size % fsdp.group_size != 0 or not 2 <= fsdp.group_size <= world_size:
        valid = [str(size) for size in range(2, world_size + 1) if world_size % size == 0]
        yield (
            f"parallel.fsdp.group_size: {fsdp.group_size} of {world_size} ranks cannot share a "
            f"copy: it must divide them, and 1 would be strategy: ddp; valid: "
            f"{', '.join(valid) or 'none, use ddp'}"
        )


def _deepspeed(config: TrainingRun) -> Iterator[str]:
    if importlib.util.find_spec("deepspeed") is None:
        yield (
            "parallel.strategy: deepspeed, but it is not installed; pip install setuptools wheel, "
            "then pip install --no-build-isolation 'lgm-scale[deepspeed]', or use fsdp"
        )
    deepspeed = config.parallel.deepspeed or DeepSpeedConfig()
    if deepspeed.offload == "all" and deepspeed.stage != 3:
        yield (
            f"parallel.deepspeed.offload: all needs stage: 3, not {deepspeed.stage}: weights are "
            "whole on every rank before that; use optimizer"
        )
    if deepspeed.bucket_mib < 1:
        yield f"parallel.deepspeed.bucket_mib: {deepspeed.bucket_mib} must be 1 or more"
    if config.train.compile and deepspeed.stage == 3:
        yield (
            "train.compile: true has no use with parallel.deepspeed.stage: 3, whose hooks gather "
            "weights inside the blocks: torch compiles the pieces between them over and over, and "
            "gives up; set it to false, or use stage: 2 or parallel.strategy: fsdp"
        )
    elif config.train.compile and _torch_version() > (2, 7):
        # Backend aot_eager, twelve steps: off by 0.09. With inductor, four steps agreed to 1e-6.
        yield (
            "train.compile: true gave wrong losses under parallel.strategy: deepspeed in a test of "
            f"torch 2.11, and torch {version('torch')} is here; set it to false, use "
            "parallel.strategy: fsdp, or torch 2.7"
        )


def _torch_version() -> tuple[int, ...]:
    """Major and minor number of the torch that is installed, which need not be imported for it."""
    return tuple(int(part) for part in version("torch").split(".")[:2])
