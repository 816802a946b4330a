"""Autoguidance by another network: what it computes, what it costs, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.autoguidance import AutoguidedPipeline
from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.bundle import LGMBundle
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.pipeline import LGMPipeline
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.sampling.config import SamplerConfig

N, D = 16, 8
LABELS = torch.tensor([3, 1, 2])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(
        TokenizerModelConfig(
            size="mini", image_size=32, patch_size=8, num_base_tokens=N, latent_dim=D,
            quantizer="none", num_codebooks=1,
        )
    ).eval()  # fmt: skip


def bundle(tokenizer: Tokenizer, depth: int, seed: int) -> LGMBundle:
    torch.manual_seed(seed)
    net = MergeDiT(32, depth, 2, D, N, 10).eval()
    with torch.no_grad():  # a new network's velocity is zero
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stats = LatentStats(torch.zeros(D), torch.ones(D))
    classes = tuple(map(str, range(10)))
    return LGMBundle(net, tokenizer, tokenizer.merge_tree(), stats, classes, {})


def latents(pipe: LGMPipeline, num_tokens: int, cfg_scale: float) -> Tensor:
    """One Euler step, so that they are linear in the velocity."""
    config = SamplerConfig(num_steps=2, cfg_scale=cfg_scale, cfg_interval=(0.0, 1.0))
    return pipe.latents(LABELS, torch.arange(3), num_tokens, 0, config)


def test_it_leads_away_from_the_weak_network_with_the_class(tokenizer):
    strong, weak = bundle(tokenizer, 2, 0), bundle(tokenizer, 1, 1)
    pipe = AutoguidedPipeline(strong, weak)
    far, near = latents(LGMPipeline(strong), N, 1.0), latents(LGMPipeline(weak), N, 1.0)
    assert torch.equal(latents(pipe, N, 1.0), far)  # guidance is off
    torch.testing.assert_close(latents(pipe, N, 3.0), near + 3 * (far - near))
    assert (latents(LGMPipeline(strong), N, 3.0) - latents(pipe, N, 3.0)).abs().max() > 0.01


def test_a_network_that_is_its_own_weak_branch_guides_nowhere(tokenizer):
    same = bundle(tokenizer, 2, 0)
    there = latents(LGMPipeline(same), 4, 1.0)
    torch.testing.assert_close(latents(AutoguidedPipeline(same, same), 4, 3.0), there)


def test_the_weak_branch_counts_with_its_own_operations(tokenizer):
    strong, weak = bundle(tokenizer, 2, 0), bundle(tokenizer, 1, 1)
    config = SamplerConfig(num_steps=5, cfg_scale=2.0, cfg_interval=(0.5, 1.0), timestep_shift=1.0)
    pipe, rows = AutoguidedPipeline(strong, weak), 4 * strong.net.flops(8) + 2 * weak.net.flops(8)
    assert pipe.image_flops(config, 8) == rows + pipe.decoder_flops()


def test_a_second_length_is_refused(tokenizer):
    same = bundle(tokenizer, 1, 0)
    with pytest.raises(ConfigError, match="uncond_num_tokens and length_schedule are for a netw"):
        AutoguidedPipeline(same, same).check(SamplerConfig(cfg_scale=2.0, uncond_num_tokens=4), 8)
