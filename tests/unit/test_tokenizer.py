from __future__ import annotations

import pytest
import torch

from lgm_scale.errors import ConfigError
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.length_control import LearnedMerging, exploration_noise
from lgm_scale.families.tokenizer.losses import alignment_loss, entropy_loss, pixel_loss
from lgm_scale.families.tokenizer.network import Tokenizer, lattice_positions


def small_tokenizer(latent_init: str = "aligned") -> Tokenizer:
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=8, num_base_tokens=16, latent_dim=8, codebook_size=32)
    return Tokenizer(TokenizerModelConfig(size="tiny", latent_init=latent_init, **sizes))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("num_tokens", [4, 8, 16])
def test_training_pass_equals_reconstruction(images, num_tokens):
    tokenizer = small_tokenizer().eval()
    out = tokenizer(images, num_tokens)
    assert out.reconstruction.shape == images.shape
    assert out.z.shape == (3, 16, 8)
    expected = tokenizer.reconstruct(images, num_tokens)
    torch.testing.assert_close(out.reconstruction, expected, atol=1e-5, rtol=1e-5)


def test_full_length_merges_nothing(images):
    tokenizer = small_tokenizer().eval()
    torch.testing.assert_close(
        tokenizer.reconstruct(images, 16), tokenizer.decode(tokenizer.encode(images))
    )


@pytest.mark.parametrize("num_tokens", [4, 16])
def test_every_parameter_gets_a_gradient(images, num_tokens):
    tokenizer = small_tokenizer()
    out = tokenizer(images, num_tokens, exploration_noise(0, 0, 16))
    loss = pixel_loss(out.reconstruction, images) + entropy_loss(out.code_logits)
    loss = loss + alignment_loss(out.z, out.similarity, 4)
    loss.backward()
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None]
    assert without == []


def test_without_a_quantizer_latents_are_as_they_come(images):
    sizes = dict(image_size=32, patch_size=8, num_base_tokens=16, latent_dim=8)
    net = Tokenizer(TokenizerModelConfig(size="tiny", quantizer="none", **sizes)).eval()
    assert not [name for name in net.state_dict() if "quantizer" in name]
    z = net.encode(images)
    assert torch.equal(z, net.to_latent(net.encoder(images)))
    out = net(images, 8)
    assert out.code_logits is None
    assert torch.equal(out.z, z)
    quantized = small_tokenizer()
    cost = 16 * 2 * 8 * 2 * 32  # tokens, twice D products with each of the codes
    assert quantized.encoder_flops() - net.encoder_flops() == cost


def test_exploration_is_keyed_on_seed_and_step():
    first = exploration_noise(0, 5, 16)
    assert first.shape == (120,)
    assert abs(first).max() <= 0.1
    assert (first == exploration_noise(0, 5, 16)).all()
    assert (first != exploration_noise(0, 6, 16)).any()
    assert (first != exploration_noise(1, 5, 16)).any()
    trees = {
        tuple(
            LearnedMerging(16, 4)
            .tree(exploration_noise(0, step, 16, 5.0))
            .merges.flatten()
            .tolist()
        )
        for step in range(4)
    }
    assert len(trees) > 1


def test_lattices_of_different_density_agree_in_place():
    fine, coarse = lattice_positions(8, 96, 8.0), lattice_positions(4, 96, 8.0)
    nearest = torch.cdist(coarse, fine).argmin(1)
    rows, columns = nearest // 8, nearest % 8
    index = torch.arange(16)
    assert ((rows - (2 * (index // 4) + 0.5)).abs() <= 0.5).all()
    assert ((columns - (2 * (index % 4) + 0.5)).abs() <= 0.5).all()


def test_aligned_start_lets_content_reach_its_own_latent(images):
    """A change of one patch changes the latent at its place more than the others."""

    def effect(tokenizer: Tokenizer) -> torch.Tensor:
        changed = images.clone()
        changed[:, :, 8:16, 16:24] *= -1  # patch row 1, column 2: token 6
        with torch.no_grad():
            difference = tokenizer.encoder(changed) - tokenizer.encoder(images)
        return difference.norm(dim=-1).mean(0)

    assert effect(small_tokenizer("aligned")).argmax() == 6


def test_wrong_image_size_is_named(images):
    with pytest.raises(ConfigError, match="32x16 given to a tokenizer of 32 pixels"):
        small_tokenizer().encode(images[..., :16])
