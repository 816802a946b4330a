"""Constant tokens per step: the order of samples, resume, micro-batches, ranks, rules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_pipeline import Steps, metrics, run_command, train_in_process

from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import ConfigError
from lgm_scale.planning.plan import describe
from lgm_scale.training.batch_scaling import split_by_tokens
from lgm_scale.training.length_schedule import LengthSchedule, steps_per_epoch

TRAIN = "lgm_scale/train.py"
NUM_SAMPLES = 68  # 17 of the stream's batches of 4; a cycle of 16, 8, 4 tokens takes 1 + 2 + 4


def scaled_config(small_pipeline, name: str, **changes) -> Path:
    train = {
        "max_duration": "2ep",
        "global_batch_size": 4,
        "precision": "fp32",
        "batch_scaling": "constant_tokens",
    }
    return small_pipeline.generator_config(
        small_pipeline.root / name, lengths={"choices": [16, 8, 4]}, train=train | changes
    )


@pytest.fixture(scope="module")
def undisturbed(small_pipeline) -> tuple[Path, Steps]:
    steps = Steps()
    return train_in_process(scaled_config(small_pipeline, "scaled"), on_step=steps), steps


def in_turn(steps: Steps) -> list[int]:
    """Sample ids of all steps."""
    return [sample for _, ids in steps.seen.values() for sample in ids]


def test_every_sample_is_visited_once_per_epoch_at_equal_tokens(undisturbed):
    steps = undisturbed[1].seen
    assert list(steps) == list(range(15))
    assert [k for k, _ in steps.values()] == [16, 8, 4] * 5
    sizes = [len(ids) for _, ids in steps.values()]
    # An epoch's last step takes what is left: 8 of 8 samples in the first, 12 of 16 in the second.
    assert sizes == [4, 8, 16, 4, 8, 16, 4, 8, *(16, 4, 8, 16, 4, 8, 12)]
    order = in_turn(undisturbed[1])
    first, second = order[:NUM_SAMPLES], order[NUM_SAMPLES:]
    assert sorted(first) == sorted(second) == list(range(NUM_SAMPLES))
    assert first != second


def test_the_order_of_samples_is_that_of_unscaled_training(small_pipeline, undisturbed):
    plain = Steps()
    config = scaled_config(small_pipeline, "unscaled", batch_scaling="constant_samples")
    train_in_process(config, on_step=plain)
    assert all(len(ids) == 4 for _, ids in plain.seen.values())
    assert in_turn(undisturbed[1]) == in_turn(plain)


@pytest.mark.parametrize(("stop", "first"), [(6, 4), (14, 12)])
def test_a_resumed_run_takes_the_same_samples(small_pipeline, undisturbed, stop, first):
    config = scaled_config(small_pipeline, f"scaled-{stop}")  # states after steps 4, 8, 12
    with pytest.raises(KeyboardInterrupt):
        train_in_process(config, on_step=Steps(stop))
    rest = Steps()
    out = train_in_process(config, on_step=rest)
    expected, steps = undisturbed
    assert rest.seen == {step: seen for step, seen in steps.seen.items() if step >= first}
    assert metrics(out) == metrics(expected)
    again, weights = (
        load_file(folder / "bundle" / "generator.safetensors") for folder in (out, expected)
    )
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_micro_batches_hold_equal_tokens(small_pipeline, undisturbed):
    split = split_by_tokens(2 * 16)
    for k, size in ((16, 4), (8, 8), (4, 16)):
        batch = {"sample_ids": torch.arange(size), "num_tokens": k, "step": 0}
        assert [len(part["sample_ids"]) * k for part in split(batch, 2)] == [32, 32]
    config = scaled_config(small_pipeline, "scaled-micro", device_microbatch_size=2)
    for row, expected in zip(
        metrics(train_in_process(config)), metrics(undisturbed[0]), strict=True
    ):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_micro_batches_by_tokens_change_no_loss(small_pipeline):
    plain = {"batch_scaling": "constant_samples", "max_duration": "6ba"}
    whole = train_in_process(scaled_config(small_pipeline, "by-samples", **plain))
    # At K = 16, 8 and 4: four micro-batches of 1, then 3 and 1, then one of 4.
    parts = [
        split_by_tokens(24)({"sample_ids": torch.arange(4), "num_tokens": k}, 4) for k in (16, 8, 4)
    ]
    assert [[len(part["sample_ids"]) for part in each] for each in parts] == [[1] * 4, [3, 1], [4]]
    config = scaled_config(small_pipeline, "by-tokens", device_microbatch_tokens=24, **plain)
    rows, expected = metrics(train_in_process(config)), metrics(whole)
    assert [row["num_tokens"] for row in rows] == [16, 8, 4] * 2
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-6)


@pytest.mark.slow
def test_two_ranks_take_the_samples_of_one(small_pipeline, undisturbed):
    out = small_pipeline.root / "scaled-two"
    config = scaled_config(small_pipeline, out.name)
    result = run_command(TRAIN, config, "data.num_workers=1", ranks=2)
    assert result.returncode == 0, result.stderr
    rows, expected = metrics(out), metrics(undisturbed[0])
    assert [row["num_tokens"] for row in rows] == [row["num_tokens"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert row[name] == pytest.approx(other[name], abs=1e-5)


@pytest.mark.parametrize(
    ("choices", "batches", "steps"),
    [
        ([16], 5, 5),
        ([16, 8, 4], 1, 1),
        ([16, 8, 4], 2, 2),  # 1 + 1 of 2, where the cycle begins at 16
        ([16, 8, 4], 7, 3),
        ([16, 8, 4], 17, 8),  # two rounds, then 1 + 2
        ([4, 4, 4, 4, 2, 2, 1], 12, 7),
        ([4, 4, 4, 4, 2, 2, 1], 16, 11),  # one round, then 1 + 1 + 1 + 1
    ],
)
def test_steps_of_an_epoch_are_those_of_the_worst_beginning(choices, batches, steps):
    assert steps_per_epoch(LengthSchedule(choices), batches) == steps


def test_rules_and_plan(small_pipeline):
    path = str(scaled_config(small_pipeline, "scaled-rules"))
    with pytest.raises(ConfigError, match=r"\[6\] do not divide the longest, 16"):
        load_training_run(path, ["lengths.choices=[16,6]"], 1, has_gpu=False)
    with pytest.raises(ConfigError, match=r"drop lengths\.weights"):
        load_training_run(path, ["lengths.weights=[1,1,1]"], 1, has_gpu=False)
    tokenizer = str(small_pipeline.tokenizer_config(small_pipeline.root / "tokenizer-rules"))
    with pytest.raises(ConfigError, match="is for generators"):
        load_training_run(tokenizer, ["train.batch_scaling=constant_tokens"], 1, has_gpu=False)
    with pytest.raises(ConfigError, match="device_microbatch_tokens: 64 is for generators"):
        load_training_run(tokenizer, ["train.device_microbatch_tokens=64"], 1, has_gpu=False)
    with pytest.raises(ConfigError, match=r"tokens: 15 does not hold one sample of 16 tokens"):
        load_training_run(path, ["train.device_microbatch_tokens=15"], 1, has_gpu=False)
    both = ["train.device_microbatch_tokens=32", "train.device_microbatch_size=2"]
    with pytest.raises(ConfigError, match="device_microbatch_size: 2; set one of them to null"):
        load_training_run(path, both, 1, has_gpu=False)
    config = load_training_run(path, ["data.num_samples=68"], 1, has_gpu=False)
    text = describe(config, 1)
    assert text.count("  64   ") == 3  # tokens per step, at each K
    assert "68 (at most 8 steps)" in text
