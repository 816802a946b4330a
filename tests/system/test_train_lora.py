"""Training an adapter: frozen base, resume, one bundle for several lengths, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_pipeline import Steps, metrics, random_generator, train_in_process

from lgm_scale.build import build_dataset, build_optimizer
from lgm_scale.bundle import read_bundle
from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.base import family_of
from lgm_scale.families.lgm.bundle import GENERATOR_NAME, load_lgm_bundle
from lgm_scale.parallel.shards import local_shards
from lgm_scale.planning.plan import describe
from lgm_scale.training.ema import EMA


@pytest.fixture(scope="module")
def base(small_pipeline) -> Path:
    return random_generator(small_pipeline)


def lora_config(small_pipeline, base: Path, name: str, num_tokens: int = 8, **changes) -> Path:
    return small_pipeline.generator_config(
        small_pipeline.root / name,
        lengths={"choices": [num_tokens, num_tokens]},
        objective={"noise_scale": "legacy"},
        lora={"base": str(base), "rank": 3, "alpha": 6.0},
        **changes,
    )


@pytest.fixture(scope="module")
def trained(small_pipeline, base) -> Path:
    """A run of 10 steps at 8 tokens."""
    return train_in_process(lora_config(small_pipeline, base, "lora-8"))


def adapter_of(out: Path, num_tokens: int = 8) -> dict[str, torch.Tensor]:
    return load_file(out / "bundle" / f"adapter_{num_tokens}.safetensors")


def test_only_the_adapter_is_trained_and_kept(base, trained):
    rows = metrics(trained)
    assert [row["num_tokens"] for row in rows] == [8] * 10
    info = read_bundle(trained / "bundle", "generator")
    assert info["files"][GENERATOR_NAME] == read_bundle(base, "generator")["files"][GENERATOR_NAME]
    assert info["adapters"]["8"]["alpha"] == 6.0
    assert info["adapters"]["8"]["training"]["steps"] == 10
    weights = adapter_of(trained)
    assert {len(weights[name]) for name in weights if "lora_A" in name} == {3}
    assert all(weights[name].abs().max() > 0 for name in weights)  # B starts at zero
    assert load_lgm_bundle(trained / "bundle").network(8) is not None


def test_an_interrupted_run_goes_on_where_it_was(small_pipeline, base, trained):
    config = lora_config(small_pipeline, base, "lora-interrupted")
    with pytest.raises(KeyboardInterrupt):
        train_in_process(config, on_step=Steps(stop=6))
    rest = Steps()
    out = train_in_process(config, on_step=rest)
    assert list(rest.seen) == [4, 5, 6, 7, 8, 9]  # the last resume state was that of step 4
    assert metrics(out) == metrics(trained)
    again, expected = adapter_of(out), adapter_of(trained)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_second_length_joins_the_first(small_pipeline, trained):
    config = lora_config(small_pipeline, trained / "bundle", "lora-4", 4)
    out = train_in_process(config)
    bundle = load_lgm_bundle(out / "bundle")
    assert sorted(bundle.adapters) == [4, 8]
    first = adapter_of(trained)
    assert all(torch.equal(bundle.adapters[8].weights[name], first[name]) for name in first)
    assert not torch.equal(
        bundle.adapters[4].weights["blocks.0.attn.qkv.lora_B.weight"],
        first["blocks.0.attn.qkv.lora_B.weight"],
    )


def loaded(path: Path, *overrides: str):
    return load_training_run(str(path), list(overrides), 1, has_gpu=False)


def test_the_average_is_of_the_adapter_alone(small_pipeline, base):
    config = loaded(lora_config(small_pipeline, base, "lora-model"))
    model = family_of(config).training_model(config, build_dataset(config))
    ema = EMA(0.9)
    ema.start(local_shards(model, build_optimizer(config.optimizer, {"generator": [model.net]})))
    names = ema.full_weights().keys()
    assert names == {name for name, _ in model.net.named_parameters() if "lora_" in name}
    assert len(names) == 4 * 4 * 2
    expected = load_file(base / GENERATOR_NAME)["blocks.0.attn.qkv.weight"]
    assert torch.equal(model.net.state_dict()["blocks.0.attn.qkv.base_layer.weight"], expected)


def test_what_does_not_fit_the_base_is_told_at_once(small_pipeline, base, trained):
    path = lora_config(small_pipeline, base, "lora-unfit")
    config = loaded(path, "objective.noise_scale=corrected", "model.num_blocks=2")
    with pytest.raises(ConfigError, match="does not fit this run") as caught:
        family_of(config).training_model(config, build_dataset(config))
    assert "noise_scale: 'corrected' here, 'legacy' there" in str(caught.value)
    assert "model.num_blocks: 2 here, 4 there" in str(caught.value)
    config = loaded(path, f"lora.base={trained / 'bundle'}")
    with pytest.raises(ConfigError, match="has an adapter for 8 already"):
        family_of(config).training_model(config, build_dataset(config))
    config = loaded(path, f"lora.base={small_pipeline.tokenizer}")
    with pytest.raises(CheckpointError, match="a generator bundle is needed"):
        family_of(config).training_model(config, build_dataset(config))


def test_rules_of_an_adapter_run(small_pipeline, base):
    path = lora_config(small_pipeline, base, "lora-rules")
    with pytest.raises(ConfigError) as caught:
        loaded(path, "lengths.choices=[8,4]", "lora.rank=0", "lora.alpha=-1", "lora.rang=3")
    for text in ("for one token length", "lora.rank: 0", "lora.alpha: -1", "did you mean 'rank'"):
        assert text in str(caught.value)


def test_a_plan_counts_only_the_adapter_as_trained(small_pipeline, base):
    config = loaded(lora_config(small_pipeline, base, "lora-plan"))
    text = describe(config, 1)
    # Rank 3, width 128, hidden 341: four layers in each of four blocks.
    count = 4 * 3 * ((128 + 384) + (128 + 128) + (128 + 682) + (341 + 128))
    assert f"the adapter's {count / 1e6:.2f} M" in text
