"""Generators on merged and on truncated latents, for their comparison."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from typed_commands import refusal

from benchmarks.latent_generators import (
    LARGEST_LR,
    SHORTEST,
    FirstTokens,
    generate,
    learning_rate,
    main,
    sampler,
    train,
)
from lgm_scale.families.lgm.config import LGMObjectiveConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.lora import TARGETS, add_adapter
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.flow import NoiseScale

N, D = 16, 8


def tokenizer(control: str) -> Tokenizer:
    return Tokenizer(
        TokenizerModelConfig(
            size="mini", image_size=32, patch_size=8, num_base_tokens=N, latent_dim=D,
            quantizer="none", num_codebooks=1, length_control=control,  # type: ignore[arg-type]
        )
    ).eval()  # fmt: skip


def generator(tok: Tokenizer) -> LGMTrainingModel:
    torch.manual_seed(0)
    net = MergeDiT(32, 1, 2, D, N, 10)
    with torch.no_grad():  # a new network's velocity is zero
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tree = tok.merge_tree() if tok.merging.has_tree else FirstTokens(N)
    stats = LatentStats(torch.full((D,), 3.0), torch.ones(D))
    return LGMTrainingModel(net, tree, stats, LGMObjectiveConfig(label_dropout=0.1), 0)


def test_the_first_tokens_are_kept_as_they_are():
    z = torch.randn(3, N, D)
    cut = FirstTokens(N).assignment(5)
    assert torch.equal(cut.merge(z), z[:, :5])
    assert torch.equal(cut.unmerge(z[:, :5])[:, :5], z[:, :5])
    assert cut.sizes.tolist() == [1] * 5
    assert (cut.num_tokens, cut.num_base_tokens) == (5, N)


@pytest.mark.parametrize("control", ["lgm", "truncate"])
def test_the_decoder_reads_what_the_length_control_leaves(control, monkeypatch):
    tok = tokenizer(control)
    model, seen = generator(tok), []

    def decode(z: Tensor) -> Tensor:
        seen.append(z)
        return torch.zeros(len(z), 3, 32, 32)

    monkeypatch.setattr(tok, "decode", decode)
    for num_tokens in (4, N):
        assert generate(model, tok, num_tokens, torch.arange(6), seed=1).dtype == torch.uint8
    few, full = seen
    assert full.abs().min() > 0
    if control == "truncate":
        assert few[:, 4:].abs().max() == 0  # zeros, and not the mean of the latents
        assert few[:, :4].abs().min() > 0
    else:
        assert torch.allclose(few, tok.merging.full_length(few, 4), atol=1e-5)


@pytest.mark.slow
def test_training_moves_every_weight_and_repeats():
    tok = tokenizer("truncate")
    latents, labels = torch.randn(80, N, D), torch.arange(80) % 10
    ends = []
    for _ in range(2):
        model = generator(tok)
        before = {name: value.detach().clone() for name, value in model.net.named_parameters()}
        train(model, latents, labels, [16, 4], steps=51, seed=2)
        ends.append(dict(model.net.named_parameters()))
        assert all(not torch.equal(before[name], value) for name, value in ends[-1].items())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_guidance_is_about_two_in_every_token():
    assert sampler(N, 4, merged=True, scale=NoiseScale.CORRECTED).cfg_scale == 5
    for merged, scale in ((True, NoiseScale.LEGACY), (False, NoiseScale.CORRECTED)):
        assert sampler(N, 4, merged, scale).cfg_scale == 2


def test_an_adapter_changes_its_layers_alone():
    tok = tokenizer("lgm")
    model = generator(tok)
    before = {name: value.detach().clone() for name, value in model.net.named_parameters()}
    add_adapter(model.net, rank=2, alpha=2)
    latents, labels = torch.randn(80, N, D), torch.arange(80) % 10
    train(model, latents, labels, [4], steps=SHORTEST, seed=2, first_step=600)
    after = dict(model.net.named_parameters())
    for name, value in before.items():
        there = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
        there = there if there is not None else after[name.replace(".bias", ".base_layer.bias")]
        assert torch.equal(there, value), name
    ups = [value for name, value in after.items() if ".lora_B." in name]
    assert len(ups) == len(TARGETS)
    assert all(value.abs().max() > 0 for value in ups)


def test_the_rate_falls_from_the_end_of_a_warm_up_also_in_a_short_training():
    assert learning_rate(49, 600) == learning_rate(50, 600) == LARGEST_LR
    assert learning_rate(0, 60) == pytest.approx(LARGEST_LR / 15)
    assert learning_rate(59, 60) < LARGEST_LR / 10


def test_a_training_that_is_over_before_it_begins_is_refused():
    given = ("bundle", "--images", "x", "--reference", "y", "--out", "z", "--steps", "9")
    said = refusal(main, *given, "--adapter-steps", "0")
    assert "--steps: 9 must be 24 or more" in said
    assert "--adapter-steps: 0 must be 24 or more" in said
