"""Losses and quantizer against the release's numbers; LPIPS against torchmetrics."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.image.lpips import _LPIPS

from lgm_scale.families.tokenizer.losses import (
    alignment_loss,
    entropy_loss,
    pixel_loss,
    representation_loss,
)
from lgm_scale.families.tokenizer.quantizer import SoftQuantizer
from lgm_scale.frozen import LPIPS
from lgm_scale.merging.tree import cosine_similarity


@pytest.mark.parametrize("num_tokens", [8, 16, 32])
def test_alignment_loss_and_its_gradient(golden, num_tokens):
    numbers = golden("straight_through_merge")
    embeddings = numbers["embeddings"].requires_grad_()
    x = numbers[f"k{num_tokens}.x"].requires_grad_()
    loss = alignment_loss(x, cosine_similarity(embeddings), 4)
    assert torch.isclose(loss, numbers[f"k{num_tokens}.align_loss"], atol=1e-5)
    loss.backward()
    expected = numbers[f"k{num_tokens}.grad_embeddings_align"]
    assert torch.allclose(embeddings.grad, expected, atol=1e-7)  # type: ignore[arg-type]
    assert expected.abs().max() > 1e-4
    assert x.grad is None  # the target is detached


@pytest.fixture
def quantized(golden):
    numbers = golden("soft_vq")
    quantizer = SoftQuantizer(4, 64, 8)
    with torch.no_grad():
        quantizer.codes.copy_(numbers["embedding"])
    z = numbers["z"].requires_grad_()
    mixed, logits = quantizer(z)
    return numbers, quantizer, z, mixed, logits


def test_soft_quantizer_and_its_gradients(quantized):
    numbers, quantizer, z, mixed, logits = quantized
    assert torch.allclose(mixed, numbers["zq"], atol=1e-5)
    (mixed * numbers["upstream"]).sum().backward()
    assert torch.allclose(z.grad, numbers["grad_z"], atol=1e-5)
    assert torch.allclose(quantizer.codes.grad, numbers["grad_embedding"], atol=1e-5)
    # The release's indices run book by book, whatever their shape says.
    assert torch.equal(logits.argmax(-1).flatten(), numbers["indices"].flatten())


def test_entropy_loss_and_its_gradient(quantized):
    numbers, _, z, _, logits = quantized
    loss = 0.01 * entropy_loss(logits)
    assert torch.isclose(loss, numbers["entropy_loss"], atol=1e-5)
    loss.backward()
    assert torch.allclose(z.grad, numbers["grad_z_entropy"], atol=1e-5)
    assert numbers["grad_z_entropy"].abs().max() > 1e-4


def test_pixel_and_representation_loss():
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.isclose(pixel_loss(a, b), (a - b).square().mean())
    features = torch.randn(2, 5, 7)
    assert torch.isclose(representation_loss(3 * features, features), torch.tensor(-1.0))
    assert torch.isclose(representation_loss(-features, features), torch.tensor(1.0))
    across = torch.stack((features[..., 0], torch.zeros(2, 5)), dim=-1)
    assert representation_loss(across, across.flip(-1)).abs() < 1e-6


@pytest.mark.slow
def test_lpips_equals_torchmetrics():
    torch.manual_seed(0)
    ours, theirs = LPIPS().eval(), _LPIPS(net="vgg", pnet_rand=True)
    layers = {name.split(".", 1)[-1]: value for name, value in theirs.net.state_dict().items()}
    ours.features.load_state_dict(layers)
    first, second = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    expected = theirs(first, second).flatten()
    assert torch.allclose(ours(first, second), expected, atol=1e-6)
    assert (expected > 1e-4).all()
    assert ours(first, first).abs().max() < 1e-7
