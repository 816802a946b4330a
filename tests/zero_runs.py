"""Runs under DDP and ZeRO in processes of their own, for the tests that compare them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from composer import Callback, DataSpec, Trainer
from composer.algorithms import GradientClipping
from composer.utils import dist as composer_dist
from composer.utils import get_device
from rank_processes import run_calls
from small_tokenizer import small_batch, small_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate

from lgm_scale.build import build_optimizer, build_scheduler
from lgm_scale.config.schema import DeepSpeedConfig, OptimizerConfig
from lgm_scale.errors import DivergenceError
from lgm_scale.families.lgm.config import LGMObjectiveConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.merging.tree import MergeTree
from lgm_scale.parallel import deepspeed as zero
from lgm_scale.parallel.blocks import compile_blocks
from lgm_scale.parallel.collectives import mean_over_ranks
from lgm_scale.parallel.composer_internals import ShardingTrainer
from lgm_scale.parallel.deepspeed_internals import live_gradients, zero_shards
from lgm_scale.parallel.shards import ParameterShard, gather, local_shards

OLD_TORCH = torch.__version__.startswith("2.7.")
BATCH, STEPS = 8, 12
LENGTHS = (8, 16)
EMA_DECAY = 0.9
STAGES = (1, 2, 3)
OPTIMIZERS = (2, 3)
"""A stage of each of DeepSpeed's optimizers: stage 1's is stage 2's."""
WORLDS = {1: "one", 2: "two"}


class Case(NamedTuple):
    """One run; stage 0 is DDP, or one process alone."""

    stage: int
    clip: float | None = None  # with it, also warm-up and micro-batches
    offload: Any = "none"
    checkpointing: bool = False
    compile: bool = False

    @property
    def name(self) -> str:
        """As in `zero2_clip_offload-optimizer`."""
        parts = {
            f"zero{self.stage}" if self.stage else "plain": True,
            "clip": self.clip is not None,
            f"offload-{self.offload}": self.offload != "none",
            "checkpointing": self.checkpointing,
            "compile": self.compile,
        }
        return "_".join(part for part, given in parts.items() if given)


PLAIN = [Case(stage) for stage in (0, *STAGES)]
CLIPPED = [Case(stage, clip=0.1) for stage in (0, 2)]
VARIANTS = [
    Case(1, clip=0.1, offload="optimizer"),
    Case(2, offload="optimizer"),
    Case(3, clip=0.1, offload="all"),
    Case(3, checkpointing=True),
    # Refused with a newer torch, with which it gave wrong losses (parallel.rules).
    *([Case(1, compile=True)] if OLD_TORCH else []),
]
CASES = {
    2: PLAIN + CLIPPED + VARIANTS,
    1: [Case(0), Case(0, clip=0.1), Case(2), Case(3)],
}


class Latents(Dataset):
    """Samples of all steps."""

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, index: int) -> dict[str, Any]:
        latents = torch.randn(16, 4, generator=torch.Generator().manual_seed(index))
        return {"latents": latents.half(), "labels": index % 5, "sample_ids": index}


def small_generator() -> LGMTrainingModel:
    """Two blocks; the label table is frozen."""
    torch.manual_seed(0)
    net = MergeDiT(32, 2, 2, latent_dim=4, num_base_tokens=16, num_classes=5)
    for parameter in net.parameters():  # the zero start would hide everything
        nn.init.normal_(parameter, std=0.2)
    net.label_embed.requires_grad_(False)
    torch.manual_seed(0)
    tree = MergeTree.from_embeddings(torch.randn(16, 8))
    stats = LatentStats(torch.full((4,), 0.5), torch.full((4,), 2.0))
    return LGMTrainingModel(net, tree, stats, LGMObjectiveConfig(), seed=3)


class Watch(Callback):
    """Keys batches, averages weights by shards, and writes down the run."""

    def __init__(self, model: LGMTrainingModel) -> None:
        self.model = model
        self.shards: list[ParameterShard] = []
        self.weights: list[torch.Tensor] = []
        self.average: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.rates: list[float] = []

    def start(self, shards: list[ParameterShard]) -> None:
        self.shards = shards
        self.weights = [shard.weight() for shard in shards]  # views, which steps must not cut off
        self.average = [weight.clone() for weight in self.weights]

    def batch_start(self, state, logger) -> None:
        step = state.timestamp.batch.value
        state.batch |= {"step": step, "num_tokens": LENGTHS[step % len(LENGTHS)]}

    def batch_end(self, state, logger) -> None:
        torch._foreach_lerp_(self.average, self.weights, 1 - EMA_DECAY)
        self.losses.append(mean_over_ranks(self.model.record.take()["loss"]).item())
        self.rates.append(state.optimizers[0].param_groups[0]["lr"])


def everything(shards: list[ParameterShard]) -> dict[str, dict[str, torch.Tensor]]:
    """Whole weights, moments and numbers of steps."""
    found = {"weight": dict(gather(shards, [shard.weight() for shard in shards]))}
    trained = [shard for shard in shards if shard.trainable]
    states = [shard.optimizer_state() for shard in trained]
    for key in ("exp_avg", "exp_avg_sq"):
        found[key] = dict(gather(trained, [state[key] for state in states]))
    found["step"] = {p.name: s["step"].clone() for p, s in zip(trained, states, strict=True)}
    return found


def checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)


def options_of(case: Case, model: LGMTrainingModel, world_size: int) -> dict[str, Any]:
    """Of Composer's trainer."""
    config = OptimizerConfig(lr=1e-3, weight_decay=1e-2, warmup=5 if case.clip else 0)
    data = Latents()
    growth = {p: 4.0 for block in model.net.blocks for p in block.parameters()}  # as muP has it
    loader = DataLoader(
        data, BATCH // world_size, sampler=composer_dist.get_sampler(data, shuffle=False)
    )
    return {
        "model": model,
        "train_dataloader": DataSpec(
            loader, get_num_samples_in_batch=lambda batch: len(batch["sample_ids"])
        ),
        "max_duration": f"{STEPS}ba",
        "optimizers": build_optimizer(config, {"generator": [model.net]}, growth),
        "schedulers": build_scheduler(config),
        "callbacks": [Watch(model)],
        "device": "cpu",
        "precision": "fp32",
        "progress_bar": False,
        "device_train_microbatch_size": BATCH // world_size // (4 if case.clip else 1),
        "seed": 0,
    }


def run(case: Case, world_size: int) -> dict[str, Any]:
    """Train, and return what the tests read."""
    model = small_generator()
    if case.checkpointing:
        for block in model.net.blocks:
            block.forward = checkpointed(block.forward)
    if case.compile:
        compile_blocks(model.net, LENGTHS, backend="aot_eager")
    options = options_of(case, model, world_size)
    (watch,) = options["callbacks"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if case.stage == 0:
        clipping = GradientClipping("norm", case.clip) if case.clip else None
        trainer = Trainer(algorithms=clipping, **options)
        watch.start(local_shards(model, options["optimizers"]))
    else:
        sharding = DeepSpeedConfig(stage=case.stage, offload=case.offload, bucket_mib=1)  # type: ignore[arg-type]
        shard = partial(zero.shard_state, zero=sharding, clip_norm=case.clip)
        trainer = ShardingTrainer(shard, **options)
        watch.start(zero_shards(trainer.state.model.engine, model))
    found: dict[str, Any] = {"before": before, "read": dict(gather(watch.shards, watch.average))}
    found["cut"] = sum(0 < p.numel < torch.Size(p.shape).numel() for p in watch.shards)
    trainer.fit()
    trainer.close()
    found |= everything(watch.shards)
    found["average"] = dict(gather(watch.shards, watch.average))
    found |= {"losses": watch.losses, "rates": watch.rates}
    if case.stage:
        trainer.state.model.engine.destroy()  # type: ignore[operator]
    return found


def engine_of(model: nn.Module, stage: Any, bf16: bool = False) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    sharding = DeepSpeedConfig(stage=stage, bucket_mib=1)
    return zero.start_engine(model, optimizer, zero.settings(sharding, None, bf16))


def live_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Of the memory behind the tensors, each block once."""
    blocks = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({block.data_ptr(): block.nbytes() for block in blocks}.values())


def bytes_per_rank(stage: int) -> dict[str, int]:
    """Of weights as the model reads them and as the optimizer steps them, of gradients between
    backward and step, and of moments."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))
    engine = engine_of(model, stage)
    engine(torch.ones(2, 512)).square().mean().backward()
    own = [p.grad for p in model.parameters()]
    found = {"gradients": live_bytes([*live_gradients(engine), *own])}
    engine.step()
    shards = zero_shards(engine, model)
    found["master"] = live_bytes(shard.weight() for shard in shards)
    states = [shard.optimizer_state() for shard in shards]
    found["moments"] = live_bytes(s[key] for s in states for key in ("exp_avg", "exp_avg_sq"))
    weights = [(p.data, getattr(p, "ds_tensor", None)) for p in model.parameters()]
    found["weights"] = live_bytes(tensor for both in weights for tensor in both)
    engine.destroy()
    return found


def autocast_losses(stage: int, rank: int, world_size: int) -> list[float]:
    """Of five steps in bfloat16, without Composer, which refuses it on a CPU."""
    model = small_generator()
    if stage:
        wrapped = engine_of(model, stage, bf16=True)
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data, losses = Latents(), []
    for step in range(5):
        mine = range(BATCH * step + rank, BATCH * (step + 1), world_size)
        batch = default_collate([data[index] for index in mine])
        batch |= {"step": step, "num_tokens": LENGTHS[step % len(LENGTHS)]}
        if stage:
            outputs = wrapped(batch)
        else:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs = wrapped(batch)
        model.loss(outputs, batch).backward()
        (wrapped if stage else optimizer).step()
        losses.append(mean_over_ranks(model.record.take()["loss"]).item())
    if stage:
        wrapped.destroy()
    return losses


def tokenizer_run(stage: int, rank: int, world_size: int) -> dict[str, float]:
    """Losses and largest weights of four steps, every loss on."""
    model = small_model(reduce_mean=mean_over_ranks)
    # Plain steps: Adam would turn rounding noise of vanishing gradients into differences.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if stage:
        sharding = DeepSpeedConfig(stage=stage, bucket_mib=1)  # type: ignore[arg-type]
        wrapped = zero.start_engine(model, optimizer, zero.settings(sharding, None, bf16=False))
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
    found = {}
    for step in range(4):
        batch = small_batch(step, rank, world_size)
        optimizer.zero_grad()
        model.loss(wrapped(batch), batch).backward()
        (wrapped if stage else optimizer).step()
        for name, value in model.record.take().items():
            found[f"{step}.{name}"] = mean_over_ranks(value).item()
    shards = zero_shards(wrapped, model) if stage else local_shards(model, optimizer)
    for name, weight in gather(shards, [shard.weight() for shard in shards]):
        found[name] = weight.abs().max().item()
    if stage:
        wrapped.destroy()
    return found


def divergence(stage: int) -> str:
    """What a run says whose loss is finite and one gradient is not."""
    model = small_generator()
    model.net.final.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    engine = engine_of(model, stage)
    batch = default_collate([Latents()[index] for index in range(2)])
    batch |= {"step": 0, "num_tokens": 8}
    model.loss(engine(batch), batch).backward()
    try:
        zero.EngineOptimizer(engine, engine.optimizer.optimizer).step()
    except DivergenceError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def worker(folder: Path) -> None:
    """All runs of one group of processes; rank 0 writes what they give."""
    composer_dist.initialize_dist(get_device("cpu"))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    gc.freeze()  # DeepSpeed collects garbage at each start, and there is much to look through
    jobs: dict[str, Callable[[], Any]] = {
        case.name: lambda case=case: run(case, world_size) for case in CASES[world_size]
    }
    jobs["bytes"] = lambda: {stage: bytes_per_rank(stage) for stage in STAGES}
    if world_size > 1:
        jobs["autocast"] = lambda: [
            autocast_losses(stage, rank, world_size) for stage in (0, *OPTIMIZERS)
        ]
        jobs["tokenizer"] = lambda: [
            tokenizer_run(stage, rank, world_size) for stage in (0, *OPTIMIZERS)
        ]
        jobs["divergence"] = lambda: [divergence(stage) for stage in OPTIMIZERS]
    for name, job in jobs.items():
        found = job()
        if rank == 0:
            torch.save(found, folder / f"{WORLDS[world_size]}_{name}.pt")
        dist.barrier()


def run_all(folder: Path) -> dict[str, Any]:
    """Name -> what was found, of every run; names begin with the number of ranks."""
    for world_size in (2, 1):
        run_calls(world_size, worker, folder, log=folder / WORLDS[world_size], timeout=600)
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
