from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lgm_scale.families.lgm.config import LGMObjectiveConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.families.tokenizer.config import TokenizerModelConfig, TokenizerObjectiveConfig
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.families.tokenizer.training import TokenizerTrainingModel
from lgm_scale.flow import NoiseScale
from lgm_scale.merging.tree import MergeTree
from lgm_scale.parallel.shards import local_shards
from lgm_scale.pixels import to_unit_range
from lgm_scale.training.callbacks import StepKeys
from lgm_scale.training.ema import EMA
from lgm_scale.training.length_schedule import LengthSchedule
from lgm_scale.training.record import LossRecord


def generator_model(label_dropout: float = 0.1, scale: NoiseScale = NoiseScale.CORRECTED):
    torch.manual_seed(0)
    net = MergeDiT(32, 2, 2, latent_dim=4, num_base_tokens=16, num_classes=5)
    for parameter in net.parameters():  # the zero start would hide everything
        nn.init.normal_(parameter, std=0.2)
    tree = MergeTree.from_embeddings(torch.randn(16, 8))
    stats = LatentStats(torch.full((4,), 0.5), torch.full((4,), 2.0))
    objective = LGMObjectiveConfig(noise_scale=scale.value, label_dropout=label_dropout)
    return LGMTrainingModel(net, tree, stats, objective, seed=3)


def latent_batch(num_tokens: int = 8, step: int = 7, size: int = 6) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(size, 16, 4, generator=generator).half(),
        "labels": torch.arange(size) % 5,
        "sample_ids": torch.arange(size) + 100,
        "num_tokens": num_tokens,
        "step": step,
    }


def part(batch: dict, which: slice) -> dict:
    return {key: value[which] if torch.is_tensor(value) else value for key, value in batch.items()}


def test_a_cycle_repeats_and_weights_are_kept():
    cycle = LengthSchedule([128, 128, 64, 32])
    assert [cycle.num_tokens(step) for step in range(6)] == [128, 128, 64, 32, 128, 128]
    drawn = LengthSchedule([32, 64, 256], [2, 1, 0], seed=1)
    lengths = [drawn.num_tokens(step) for step in range(3000)]
    counts = Counter(lengths)
    assert counts[256] == 0
    assert counts[32] / 3000 == pytest.approx(2 / 3, abs=0.03)
    assert lengths == [drawn.num_tokens(step) for step in range(3000)]
    other = LengthSchedule([32, 64, 256], [2, 1, 0], seed=2)
    assert lengths != [other.num_tokens(step) for step in range(3000)]


def test_step_keys_survive_micro_batching():
    from composer.core.data_spec import default_split_batch

    state = SimpleNamespace(
        batch={"latents": torch.zeros(8, 16, 4)},
        timestamp=SimpleNamespace(batch=SimpleNamespace(value=5)),
    )
    StepKeys(LengthSchedule([8, 4])).batch_start(state, None)  # type: ignore[arg-type]
    parts = default_split_batch(state.batch, 4)
    assert [(item["step"], item["num_tokens"], len(item["latents"])) for item in parts] == [
        (5, 4, 4),
        (5, 4, 4),
    ]


@pytest.mark.parametrize("num_tokens", [4, 8, 16])
@pytest.mark.parametrize("scale", list(NoiseScale))
def test_generator_loss_does_not_depend_on_the_micro_batch(num_tokens, scale):
    model = generator_model(scale=scale)
    batch = latent_batch(num_tokens)
    whole = model.loss(model(batch), batch)
    parts = [part(batch, slice(0, 2)), part(batch, slice(2, 4)), part(batch, slice(4, 6))]
    split = torch.stack([model.loss(model(item), item) for item in parts]).mean()
    torch.testing.assert_close(whole, split, atol=1e-6, rtol=1e-6)
    assert len(model.record.take()) == 1


def test_generator_randomness_is_keyed_on_the_step_and_the_sample():
    model = generator_model()
    same = [model(latent_batch()).v_target for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], model(latent_batch(step=8)).v_target)
    shifted = latent_batch()
    shifted["sample_ids"] = shifted["sample_ids"] + 1
    assert not torch.equal(same[0], model(shifted).v_target)


def test_label_dropout_sends_its_share_to_the_null_label(monkeypatch):
    model = generator_model(label_dropout=0.25)
    seen: list[torch.Tensor] = []
    forward = model.net.forward
    monkeypatch.setattr(
        model.net,
        "forward",
        lambda z, t, labels, a: seen.append(labels) or forward(z, t, labels, a),
    )
    batch = latent_batch(size=2000)
    model(batch)
    dropped = seen[0] == model.net.null_label
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(seen[0][~dropped], batch["labels"][~dropped])


def test_latents_are_standardised():
    model = generator_model()
    batch = latent_batch(num_tokens=16)
    out = model(batch)
    z = (batch["latents"].float() - 0.5) / 2.0
    noise = z - out.v_target
    assert noise.mean().abs() < 0.1
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)


def test_tokenizer_model_weighs_its_losses():
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=8, num_base_tokens=16, latent_dim=8, codebook_size=32)
    net = Tokenizer(TokenizerModelConfig(size="tiny", **sizes))
    weights = {"pixel": 2.0, "entropy": 0.5, "alignment": 3.0}
    model = TokenizerTrainingModel(net, TokenizerObjectiveConfig(**weights), seed=0)
    batch = {
        "images": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
        "sample_ids": torch.arange(4),
        "step": 0,
        "num_tokens": 8,
    }
    total = model.loss(model(batch), batch)
    terms = model.record.take()
    expected = sum(weights[name] * terms[name] for name in weights)
    torch.testing.assert_close(total.detach(), expected)
    full = batch | {"num_tokens": 16}
    model.loss(model(full), full).backward()
    assert "alignment" not in model.record.take()
    assert all(p.grad is not None for p in model.parameters())


def test_pixels_cover_the_unit_range():
    ends = to_unit_range(torch.tensor([0, 255], dtype=torch.uint8))
    assert ends.tolist() == [-1.0, 1.0]


def test_record_weighs_micro_batches_by_their_samples():
    record = LossRecord()
    record.add(3, {"loss": torch.tensor(1.0)})
    record.add(1, {"loss": torch.tensor(5.0)})
    assert record.take()["loss"].item() == 2.0
    assert record.take() == {}


@pytest.mark.parametrize("interval", [1, 3])
def test_ema_follows_its_formula(interval):
    model = nn.ModuleDict({"net": nn.Linear(3, 2), "critic": nn.Linear(3, 2)})
    layer = model["net"]
    layer.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([layer.weight])
    ema = EMA(0.75, interval)
    ema.start(local_shards(model, optimizer))
    expected = layer.weight.detach().clone()
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0), start=1):
        nn.init.constant_(layer.weight, value)
        state = SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=step)))
        ema.batch_end(state, None)  # type: ignore[arg-type]
        if step % interval == 0:
            past = 0.75**interval
            expected = past * expected + (1 - past) * value
    average = ema.full_weights()
    assert set(average) == {"weight"}
    torch.testing.assert_close(average["weight"], expected)
    assert not torch.equal(layer.weight, expected)  # never swapped in
