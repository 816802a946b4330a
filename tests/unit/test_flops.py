"""Analytic operation counts against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.sampling import sample_latents
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.merging.nesting import ContrastStats
from lgm_scale.merging.tree import MergeTree
from lgm_scale.sampling.config import SamplerConfig, Solver


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(torch.randn(64, 12, generator=torch.manual_seed(0)))


@pytest.fixture(scope="module")
def net() -> MergeDiT:
    return MergeDiT.from_size("tiny", latent_dim=16, num_base_tokens=64, num_classes=10).eval()


def build(size: str, image_size: int, patch_size: int, tokens: int, dim: int, **more) -> Tokenizer:
    sizes = dict(image_size=image_size, patch_size=patch_size, num_base_tokens=tokens)
    return Tokenizer(TokenizerModelConfig(size=size, latent_dim=dim, **sizes, **more))


def counted(run) -> int:
    """Of matrix products; fused attention is taken apart so that it is counted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


def image_flops(net: MergeDiT, tokenizer: Tokenizer, num_tokens: int, config: SamplerConfig) -> int:
    """As `Pipeline.image_flops`, without a bundle."""
    rows = config.rows(num_tokens)
    return sum(count * net.flops(k) for k, count in rows.items()) + tokenizer.decoder_flops()


@pytest.mark.parametrize("num_tokens", [4, 16, 32, 64])
def test_generator(net, tree, num_tokens):
    batch, cut = 16, tree.assignment(num_tokens)
    z_t, t = torch.randn(batch, num_tokens, 16), torch.rand(batch)
    total = counted(lambda: net(z_t, t, torch.zeros(batch).long(), cut))
    assert batch * net.flops(num_tokens) == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(num_steps=6),
        SamplerConfig(num_steps=6, cfg_scale=3.0),
        SamplerConfig(num_steps=6, cfg_scale=3.0, solver=Solver.HEUN),
        SamplerConfig(num_steps=6, cfg_scale=3.0, uncond_num_tokens=8),
        SamplerConfig(num_steps=6, cfg_scale=3.0, length_schedule=((0.0, 8), (0.2, 32))),
    ],
    ids=["unguided", "guided", "heun", "coarse guidance", "growing"],
)
def test_an_image(net, tree, config):
    batch, tokenizer = 16, build("tiny", 64, 8, 64, 16, codebook_size=64).eval()
    contrasts = ContrastStats(torch.zeros(60, 16), torch.ones(60, 16))

    def run():
        z = sample_latents(
            net, tree, 0, torch.arange(batch), torch.zeros(batch).long(), 10, 32, 16, config,
            contrasts=contrasts,
        )  # fmt: skip
        tokenizer.decode(z)

    ours = image_flops(net, tokenizer, 32, config)
    assert batch * ours == pytest.approx(counted(run), rel=0.01)


@pytest.mark.parametrize(("size", "image_size", "patch_size"), [("tiny", 64, 8), ("b", 256, 16)])
def test_tokenizer(size, image_size, patch_size):
    latents = (image_size // patch_size) ** 2
    with torch.device("meta"):
        tokenizer = build(size, image_size, patch_size, latents, 16).eval()
        images = torch.empty(2, 3, image_size, image_size)
        z = torch.empty(2, tokenizer.num_base_tokens, 16)
    encode = counted(lambda: tokenizer.encode(images))
    decode = counted(lambda: tokenizer.decode(z))
    assert 2 * tokenizer.encoder_flops() == pytest.approx(encode, rel=0.01)
    assert 2 * tokenizer.decoder_flops() == pytest.approx(decode, rel=0.01)
    assert 2 * tokenizer.flops(latents) == pytest.approx(encode + decode, rel=0.01)


def test_published_size():
    """XL at 128 tokens: half of this, 24 evaluations with both branches, is docs/performance.md."""
    with torch.device("meta"):
        net = MergeDiT.from_size("xl", latent_dim=32, num_base_tokens=256, num_classes=1000)
        tokenizer = build("b", 256, 16, 256, 32)
    config = SamplerConfig(num_steps=25, cfg_scale=6.5, cfg_interval=(0.0, 1.0))
    products = image_flops(net, tokenizer, 128, config) / 2
    assert products / 1e12 == pytest.approx(2.850, abs=5e-4)
