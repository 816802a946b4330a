"""Two ranks with half of the batch each are one process with all of it, every loss on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from composer.core import Event
from rank_processes import run_calls
from small_tokenizer import OPTIMIZER, small_batch, small_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lgm_scale.build import build_optimizer
from lgm_scale.families.tokenizer.critic import one_rank
from lgm_scale.parallel.collectives import mean_over_ranks
from lgm_scale.training.clipping import GroupClipping

NUM_STEPS = 5
TOLERANCE = 1e-5


def train(rank: int, world_size: int, sharding: str, reduce_mean) -> dict[str, torch.Tensor]:
    """Rows of losses (mean over ranks) and the gradients of the last step, on rank 0."""
    model = small_model(reduce_mean=reduce_mean)
    if sharding == "fsdp":
        # gloo ignores that float32 gradients are to be averaged, and sums them; float64 ones are
        # divided before.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float64)
        for module in (*model.children(), model):
            fully_shard(module, mp_policy=policy)
    wrapped = model
    if sharding == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    # Plain steps: Adam would turn rounding noise of vanishing gradients into differences.
    groups = build_optimizer(OPTIMIZER, model.parameter_groups()).param_groups
    optimizer = torch.optim.SGD([{"params": g["params"]} for g in groups], lr=0.05)
    clipping = GroupClipping(model.parameter_groups(), 1.0, model.record)
    results: dict[str, torch.Tensor] = {}
    for step in range(NUM_STEPS):
        batch = small_batch(step, rank, world_size)
        optimizer.zero_grad()
        model.loss(wrapped(batch), batch).backward()
        clipping.apply(Event.AFTER_TRAIN_BATCH, None, None)  # type: ignore[arg-type]
        optimizer.step()
        for name, value in model.record.take().items():
            results[f"{step}.{name}"] = mean_over_ranks(value)
    for name, parameter in model.named_parameters():
        whole = getattr(parameter, "full_tensor", parameter.detach)()
        results[f"weight.{name}"] = whole.detach().clone()
    return results


def worker(cases: list[str], folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for case in cases:
        sharding = case.split("-")[0]
        reduce_mean = one_rank if case.endswith("local") else mean_over_ranks
        results = train(rank, world_size, sharding, reduce_mean)
        if rank == 0:
            torch.save(results, folder / f"{case}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of one process, and of two for every case; `ddp-local` reduces nothing over ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = ["ddp", "fsdp", "ddp-local"]
    run_calls(2, worker, cases, folder, log=folder / "log")
    found = {case: torch.load(folder / f"{case}.pt", weights_only=True) for case in cases}
    return found | {"one": train(0, 1, "none", mean_over_ranks)}


def differences(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> dict[str, float]:
    assert first.keys() == second.keys()
    return {
        name: float(((value - second[name]).abs() / value.abs().clamp(min=1)).max())
        for name, value in first.items()
    }


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_ranks_do_not_change_a_loss_or_a_weight(results, case):
    found = differences(results["one"], results[case])
    assert {"4.critic_lecam", "4.adaptive_weight", "4.critic_consistency", "4.alignment"} < set(
        found
    )
    worst = max(found, key=lambda name: found[name])
    print(f"{case}: largest difference {found[worst]:.2g} ({worst})")
    assert found[worst] <= TOLERANCE


@pytest.mark.parametrize(
    "term", ["0.entropy", "0.alignment", "3.adversarial", "3.critic_hinge", "3.adaptive_weight"]
)
def test_the_reductions_are_needed(results, term):
    assert differences(results["one"], results["ddp-local"])[term] > 10 * TOLERANCE
