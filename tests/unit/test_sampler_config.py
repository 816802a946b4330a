"""The borders of what a sampler's settings may be, and the bits of its time grid."""

from __future__ import annotations

import json

import pytest
import torch

from lgm_scale.errors import ConfigError
from lgm_scale.sampling.config import Guidance, SamplerConfig, Solver, outside_lengths


@pytest.mark.parametrize("count", [2, 3, 4, 25, 50, 251])
def test_the_grid_has_the_bits_of_torch(count):
    expected = torch.linspace(0, 1, count, dtype=torch.float64).tolist()
    assert SamplerConfig(num_steps=count, timestep_shift=1.0).grid() == expected


def test_equal_settings_are_one_text():
    """Finished cells of a sweep are found by it."""
    whole = SamplerConfig(cfg_interval=(0, 1), length_schedule=((0, 4), (0.5, 8)))
    lists = SamplerConfig(cfg_interval=[0.0, 1.0], length_schedule=[[0.0, 4.0], [0.5, 8]])  # type: ignore[arg-type]
    text = json.dumps(whole.settings())
    assert text == json.dumps(lists.settings())
    assert SamplerConfig(**json.loads(text)) == whole
    assert type(whole.settings()["solver"]) is str  # of a member YAML would write its class


@pytest.mark.parametrize(
    "setting",
    [
        {"num_steps": 2},
        {"cfg_scale": 1.0},
        {"cfg_interval": (0.0, 0.0)},
        {"cfg_interval": (1.0, 1.0)},
        {"uncond_num_tokens": 1},
        {"uncond_num_tokens": 1, "guidance": "autoguidance"},
        {"num_steps": 5, "timestep_shift": 1.0, "length_schedule": ((0.0, 1), (0.75, 1))},
    ],
)
def test_the_last_allowed_values_are_taken(setting):
    SamplerConfig(**setting)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"cfg_interval": (-0.1, 0.5)}, "cfg_interval: (-0.1, 0.5) must be"),
        ({"uncond_num_tokens": 0}, "uncond_num_tokens: 0 must be 1 or more"),
        ({"guidance": "autoguidance"}, "guidance: autoguidance needs uncond_num_tokens"),
        ({"guidance": "some"}, "guidance: 'some' is unknown; use cfg or autoguidance"),
        ({"length_schedule": ((0.0, 0), (0.5, 8))}, "length_schedule: [[0.0, 0], [0.5, 8]] must"),
        (
            {"num_steps": 5, "timestep_shift": 1.0, "length_schedule": ((0.0, 4), (0.76, 8))},
            "length_schedule: [[0.0, 4], [0.76, 8]] never reaches its last length: the last of "
            "4 steps starts at t = 0.75",
        ),
    ],
)
def test_the_first_refused_values_are_refused_alone(setting, problem):
    with pytest.raises(ConfigError) as error:
        SamplerConfig(**setting)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(problem)


def test_a_length_begins_with_the_step_at_its_time():
    config = SamplerConfig(
        num_steps=5, timestep_shift=1.0, length_schedule=((0.0, 2), (0.5, 4), (0.75, 8))
    )
    assert [config.length_at(t, 8) for t in config.grid()] == [2, 2, 4, 8, 8]
    assert config.rows(8) == {2: 2, 4: 1, 8: 1}
    assert config.lengths(8) == {2, 4, 8}
    assert config.nested
    assert not SamplerConfig().nested
    assert SamplerConfig(uncond_num_tokens=2).nested
    assert SamplerConfig(uncond_num_tokens=2).lengths(8) == {2, 8}


def test_guided_rows_are_counted_at_both_lengths():
    """Times 0, 0.5; of the second step's two evaluations Heun leaves the last one out."""
    config = SamplerConfig(
        num_steps=3,
        timestep_shift=1.0,
        solver=Solver.HEUN,
        cfg_scale=2.0,
        cfg_interval=(0.5, 0.5),
        uncond_num_tokens=4,
    )
    assert config.evaluations() == [(0.0, 0.0), (0.0, 0.5), (0.5, 0.5)]
    assert [config.guided(t) for _, t in config.evaluations()] == [False, True, True]
    assert config.num_forwards() == 5
    assert config.rows(8) == {8: 3, 4: 2}
    assert config.rows(2) == {2: 5}  # the weak branch is never longer than the step
    wide = SamplerConfig(num_steps=5, timestep_shift=1, cfg_scale=2, cfg_interval=(0.25, 0.75))
    assert [wide.guided(t) for t in wide.grid()] == [False, True, True, True, False]


@pytest.mark.parametrize(("weak", "num_tokens", "where"), [(8, 8, "num_tokens is 8"), (7, 8, "")])
def test_a_weak_branch_has_fewer_tokens(weak, num_tokens, where):
    config = SamplerConfig(cfg_scale=2.0, guidance=Guidance.AUTOGUIDANCE, uncond_num_tokens=weak)
    if not where:
        config.check_guidance(num_tokens)
        return
    with pytest.raises(ConfigError, match=where):
        config.check_guidance(num_tokens)


def test_a_weak_branch_is_compared_with_guided_steps_alone():
    early = {"length_schedule": ((0.0, 4), (0.5, 8)), "num_steps": 5, "timestep_shift": 1.0}
    weak = {"cfg_scale": 2.0, "guidance": Guidance.AUTOGUIDANCE, "uncond_num_tokens": 4}
    SamplerConfig(cfg_interval=(0.5, 1.0), **early, **weak).check_guidance(8)
    with pytest.raises(ConfigError, match="length_schedule guides a step at 4"):
        SamplerConfig(cfg_interval=(0.25, 1.0), **early, **weak).check_guidance(8)
    # Plain guidance may have a weak branch of any length.
    SamplerConfig(cfg_scale=2.0, uncond_num_tokens=16).check_guidance(8)


def test_lengths_outside_a_tree_are_told_together():
    assert list(outside_lengths([4, 8, 16], 4, 16)) == []
    (problem,) = outside_lengths([3, 4, 16, 17], 4, 16)
    assert problem.startswith("lengths [3, 17] outside [4, 16]")
