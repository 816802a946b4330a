"""ZeRO computes what DDP computes, keeps a share of it per rank, and is read by shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

from zero_runs import (
    CLIPPED,
    OPTIMIZERS,
    PLAIN,
    STAGES,
    STEPS,
    VARIANTS,
    Case,
    run_all,
)

pytestmark = pytest.mark.slow
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Any]:
    return run_all(tmp_path_factory.mktemp("zero"))


def largest(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second) > 0
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def relative(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Of the largest difference to the largest value, the worst over the parameters."""
    assert first.keys() == second.keys() != set()
    return max(
        float((value - second[name]).abs().max() / value.abs().max().clamp(min=1e-12))
        for name, value in first.items()
    )


def same_losses(case: Case) -> Case:
    """The DDP run that must have the same losses."""
    return Case(0, clip=case.clip)


@pytest.mark.parametrize("case", PLAIN + CLIPPED + VARIANTS, ids=lambda case: case.name)
def test_losses_and_rates_are_those_of_one_process_and_of_ddp(runs, case):
    found, ddp = runs[f"two_{case.name}"], runs[f"two_{same_losses(case).name}"]
    alone = runs[f"one_{same_losses(case).name}"]
    assert len(found["losses"]) == STEPS
    assert found["rates"] == ddp["rates"] == alone["rates"]
    differences = [largest(found["losses"], other["losses"]) for other in (ddp, alone)]
    print(f"{case.name}: loss differs by {differences[0]:.2g} from DDP's, {differences[1]:.2g}")
    assert max(differences) <= TOLERANCE


@pytest.mark.parametrize("stage", [2, 3])
def test_one_rank_alone_is_enough(runs, stage):
    found, alone = runs[f"one_{Case(stage).name}"], runs[f"one_{Case(0).name}"]
    assert largest(found["losses"], alone["losses"]) <= TOLERANCE


@pytest.mark.parametrize("case", [*PLAIN[1:], *CLIPPED[1:], *VARIANTS], ids=lambda case: case.name)
def test_gradients_are_those_of_ddp(runs, case):
    """Adam's steps do not depend on the scale of gradients; its moments do."""
    found, ddp = runs[f"two_{case.name}"], runs[f"two_{same_losses(case).name}"]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert relative(ddp[moment], found[moment]) <= 1e-4
    assert {float(step) for step in found["step"].values()} == {STEPS}


def test_clipping_had_something_to_clip(runs):
    plain, clipped = runs[f"two_{Case(0).name}"], runs[f"two_{Case(0, clip=0.1).name}"]
    assert relative(plain["exp_avg_sq"], clipped["exp_avg_sq"]) > 0.5


@pytest.mark.parametrize("case", [*PLAIN[1:], *VARIANTS], ids=lambda case: case.name)
def test_shards_are_the_parameters_bit_for_bit(runs, case):
    found = runs[f"two_{case.name}"]
    assert found["cut"] > 0  # some parameters lie on both ranks
    assert list(found["read"]) == list(found["before"])
    for name, value in found["before"].items():
        assert torch.equal(found["read"][name], value), name


@pytest.mark.parametrize("case", [*PLAIN[1:], *VARIANTS], ids=lambda case: case.name)
def test_the_average_over_shards_is_that_of_ddp(runs, case):
    found, ddp = runs[f"two_{case.name}"], runs[f"two_{same_losses(case).name}"]
    assert list(found["average"]) == list(ddp["average"])
    for name, value in ddp["average"].items():
        torch.testing.assert_close(found["average"][name], value, rtol=0, atol=1e-5)
    assert relative(found["average"], found["weight"]) > 1e-4  # it is an average


MASTER = {"master", "moments"}
SHARDED = {1: MASTER, 2: MASTER | {"gradients"}, 3: MASTER | {"gradients", "weights"}}


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_sharded_takes_half_the_bytes_on_two_ranks(runs, stage):
    one, two = runs["one_bytes"][stage], runs["two_bytes"][stage]
    print(f"stage {stage}: {one} on one rank, {two} on two")
    for part in ("moments", "master", "gradients", "weights"):
        assert one[part] == (2 if part == "moments" else 1) * 4 * 4 * 512 * 512
        share = 0.5 if part in SHARDED[stage] else 1.0
        assert two[part] == pytest.approx(share * one[part]), part


def test_bfloat16_is_that_of_autocast(runs):
    ddp, *others = runs["two_autocast"]
    assert largest(ddp, runs[f"two_{Case(0).name}"]["losses"][: len(ddp)]) > 1e-4  # it is on
    for losses in others:
        assert largest(ddp, losses) <= TOLERANCE


def test_a_tokenizer_and_its_critic_train_as_under_ddp(runs):
    ddp, *others = runs["two_tokenizer"]
    assert {"3.critic_hinge", "3.adaptive_weight", "3.representation"} < set(ddp)
    for stage, found in zip(OPTIMIZERS, others, strict=True):
        assert found.keys() == ddp.keys()
        worst = max(ddp, key=lambda name: abs(found[name] - ddp[name]) / max(1, abs(ddp[name])))
        print(f"stage {stage}: {worst} is {found[worst]}, under DDP {ddp[worst]}")
        assert found[worst] == pytest.approx(ddp[worst], rel=TOLERANCE, abs=TOLERANCE)


def test_a_gradient_that_is_not_finite_ends_the_run(runs):
    assert len(runs["two_divergence"]) == len(OPTIMIZERS)
    for message in runs["two_divergence"]:
        assert "a gradient is NaN or infinite; stopped before the optimizer's step" in message
