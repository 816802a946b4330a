"""The critic and the losses around it, each against its definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_tokenizer import OBJECTIVE, small_batch, small_model, vision_transformer
from torch.utils._python_dispatch import TorchDispatchMode

from lgm_scale.families.tokenizer.critic import (
    CriticBackbone,
    CriticHeads,
    GlobalBatchNorm,
    critic_view,
)
from lgm_scale.families.tokenizer.losses import (
    adaptive_weight,
    consistency_loss,
    diff_augment,
    generator_loss,
    hinge_loss,
    lecam_loss,
    perceptual_weight,
    with_gradient,
)
from lgm_scale.frozen import to_imagenet
from lgm_scale.weights import Unfilled


def test_hinge_and_generator_loss():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake) == 0.5 * ((0 + 1) / 2 + (0 + 2) / 2)
    assert generator_loss(fake) == 1.0


def test_lecam_pulls_only_beyond_the_other_sides_mean():
    mean_real, mean_fake = torch.tensor(0.5), torch.tensor(-0.5)
    real = torch.tensor([1.5, -1.0], requires_grad=True)
    fake = torch.tensor([-1.5, 1.0], requires_grad=True)
    loss = lecam_loss(real, fake, mean_real, mean_fake)
    assert loss == (2.0**2 + 0) / 2 + (2.0**2 + 0) / 2
    gradients = torch.autograd.grad(loss, (real, fake))
    assert gradients[0].tolist() == [2.0, 0.0]
    assert gradients[1].tolist() == [-2.0, 0.0]


def test_lecam_means_move_by_a_thousandth_per_step_and_are_saved():
    model = small_model()
    batch = small_batch(OBJECTIVE.adversarial_start)
    model.loss(model(batch), batch)
    row = model.record.take()
    expected = 0.001 * torch.stack((row["logits_real"], row["logits_fake"]))
    assert torch.allclose(model.lecam_means, expected, rtol=1e-5)
    assert "lecam_means" in model.state_dict()


def test_consistency_gradient_reaches_both_sides():
    clean, seen = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    loss = consistency_loss(clean, seen)
    assert torch.isclose(loss, (clean - seen).square().mean())
    gradients = torch.autograd.grad(loss, (clean, seen))
    assert torch.allclose(gradients[0], -gradients[1])
    assert gradients[0].abs().min() > 0


def test_consistency_vanishes_without_augmentation(monkeypatch):
    monkeypatch.setattr("lgm_scale.families.tokenizer.losses.diff_augment", lambda x, draws: x)
    # A critic that sees the whole image draws no crop either.
    monkeypatch.setattr(
        "lgm_scale.families.tokenizer.training.critic_view",
        lambda images, size, rng: F.interpolate(images, (size, size), mode="area"),
    )
    model = small_model()
    model.critic.eval()  # type: ignore[union-attr]  # no power iteration between the passes
    batch = small_batch(OBJECTIVE.adversarial_start)
    model.loss(model(batch), batch)
    assert model.record.take()["critic_consistency"] < 1e-10


# --- adaptive weight --------------------------------------------------------------------------


def test_adaptive_weight_equals_the_form_with_parameter_gradients():
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 20)
    hidden = torch.randn(3, 7, 12)
    out = layer(hidden)
    first, second = out.square().mean(), (out * torch.randn_like(out)).sin().mean()
    (pull,) = torch.autograd.grad(first, layer.weight, retain_graph=True)
    (push,) = torch.autograd.grad(second, layer.weight, retain_graph=True)
    at_out = [torch.autograd.grad(x, out, retain_graph=True)[0] for x in (first, second)]
    weight = adaptive_weight(*at_out, hidden)
    assert torch.isclose(weight, pull.norm() / (push.norm() + 1e-4), rtol=1e-5)
    assert not weight.requires_grad


def test_adaptive_weight_is_bounded():
    ones, hidden = torch.ones(1, 2, 3), torch.ones(1, 2, 4)
    assert adaptive_weight(1e6 * ones, 0 * ones, hidden) == 1e4
    assert adaptive_weight(0 * ones, ones, hidden) == 0


def test_with_gradient_hands_on_value_and_gradient():
    x, gradient = torch.randn(5, requires_grad=True), torch.randn(5)
    loss = with_gradient(torch.tensor(7.0), x, gradient)
    (3 * loss).backward()
    assert loss == 7
    assert torch.allclose(x.grad, 3 * gradient)  # type: ignore[arg-type]


def test_perceptual_warm_up_is_linear():
    assert [perceptual_weight(2.0, step, 10) for step in (0, 5, 10, 99)] == [0, 1, 2, 2]
    assert perceptual_weight(2.0, 0, 0) == 2


# --- DiffAugment ------------------------------------------------------------------------------

NEUTRAL = [0.5, 0.5, 0.5, 0.5, 0.5]  # no colour change, no shift; then the cut's centre


def test_neutral_draws_only_cut_a_square_of_half_the_side():
    images = torch.rand(1, 3, 16, 16) + 1
    out = diff_augment(images, torch.tensor([[*NEUTRAL, 0.5, 0.5]]))
    gone = out == 0
    assert gone.sum() == 3 * 8 * 8
    assert gone[0, :, 4:12, 4:12].all()
    assert torch.allclose(out[~gone], images[~gone], atol=1e-5)


def test_a_cut_may_reach_over_the_border():
    out = diff_augment(torch.ones(1, 3, 16, 16), torch.tensor([[*NEUTRAL, 0.0, 0.999]]))
    assert (out == 0)[0, 0, :4, -4:].all()
    assert (out == 0).sum() == 3 * 4 * 4


@pytest.mark.parametrize(("draw", "shift"), [(0.0, -2), (0.5, 0), (0.999, 2)])
def test_translation_reaches_an_eighth_and_fills_with_zeros(draw, shift):
    images = torch.rand(1, 3, 16, 16) + 1
    draws = torch.tensor([[0.5, 0.5, 0.5, draw, 0.5, 0.0, 0.0]])
    out = diff_augment(images, draws)[0, :, 4:]  # below the cut
    expected = torch.zeros_like(images)
    if shift > 0:
        expected[:, :, shift:] = images[:, :, :-shift]
    elif shift < 0:
        expected[:, :, :shift] = images[:, :, -shift:]
    else:
        expected = images
    assert torch.allclose(out, expected[0, :, 4:], atol=1e-5)


def test_colour_changes_are_per_image():
    images = torch.rand(2, 3, 16, 16)
    draws = torch.tensor([[*NEUTRAL, 0.5, 0.5], [0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    kept = torch.ones(16, 16, dtype=torch.bool)
    kept[4:12, 4:12] = False
    difference = (diff_augment(images, draws) - images)[..., kept]
    assert torch.allclose(difference[0], torch.zeros(()), atol=1e-5)
    assert torch.allclose(difference[1], torch.tensor(0.4), atol=1e-5)


# --- the critic -------------------------------------------------------------------------------


def test_batch_norm_equals_torchs():
    x = torch.randn(4, 6, 5, requires_grad=True)
    norm = GlobalBatchNorm(6)
    reference = torch.nn.BatchNorm1d(6, eps=1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        reference.weight.copy_(norm.weight)
        reference.bias.copy_(norm.bias)
    upstream = torch.randn_like(x)
    ours, theirs = norm(x), reference(x)
    assert torch.allclose(ours, theirs, atol=1e-5)
    gradients = [torch.autograd.grad((y * upstream).sum(), x)[0] for y in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_heads_follow_their_definition():
    torch.manual_seed(0)
    critic = CriticHeads(channels=4, num_depths=2).eval()
    features = [torch.randn(3, 4, 10) for _ in range(2)]
    rows = []
    for head, x in zip(critic.heads, features, strict=True):
        point, context = head.point[0], head.context[0]
        for weight in (point.weight, context.weight, head.out.weight):
            assert torch.linalg.matrix_norm(weight.flatten(1), 2) < 1.3  # near 1, after 15 rounds
        bn = torch.nn.BatchNorm1d(4, eps=1e-6)
        x = F.leaky_relu(bn(F.conv1d(x, point.weight, point.bias)), 0.2)
        wide = F.pad(x, (4, 4), mode="circular")
        inner = F.leaky_relu(bn(F.conv1d(wide, context.weight, context.bias)), 0.2)
        x = (inner + x) / math.sqrt(2)
        rows.append(F.conv1d(x, head.out.weight, head.out.bias)[:, 0])
    assert torch.allclose(critic(features), torch.cat(rows, dim=1), atol=1e-5)


def test_backbone_reads_before_the_first_block_and_after_chosen_ones():
    vit = vision_transformer(24, 4, 16, 3)
    seen = CriticBackbone(vit, depths=(0, 2))
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    features = seen(images)
    tokens = vit._pos_embed(vit.patch_embed(to_imagenet(images)))
    for index, block in enumerate([torch.nn.Identity(), *vit.blocks]):
        tokens = block(tokens)
        place = {0: 0, 1: 1, 3: 2}.get(index)
        if place is not None:
            expected = (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2)
            assert torch.allclose(features[place], expected, atol=1e-5)
    assert [tuple(map_.shape) for map_ in features] == [(2, 16, 36)] * 3


class Draws:
    """A generator that says what it is told."""

    def __init__(self, uniform: float) -> None:
        self.uniform = uniform

    def random(self) -> float:
        return self.uniform

    def integers(self, low, high, size):
        assert (low, high) == (0, 9)
        return np.array([3, 8])


def test_views_of_larger_equal_and_smaller_images():
    images = torch.rand(2, 3, 32, 32)
    crop = critic_view(images, 24, Draws(0.4))  # type: ignore[arg-type]
    assert torch.equal(crop, images[:, :, 3:27, 8:32])
    area = critic_view(images, 24, Draws(0.6))  # type: ignore[arg-type]
    assert torch.equal(area, F.interpolate(images, (24, 24), mode="area"))
    assert critic_view(images, 32, Draws(0.4)) is images  # type: ignore[arg-type]
    larger = critic_view(images, 48, Draws(0.4))  # type: ignore[arg-type]
    assert torch.equal(larger, F.interpolate(images, (48, 48), mode="bicubic"))


@pytest.mark.parametrize(("step", "on"), [(0, False), (1, False), (2, True), (50, True)])
def test_the_game_starts_at_its_step(step, on):
    model = small_model()
    batch = small_batch(0) | {"step": step}
    model.loss(model(batch), batch)
    row = model.record.take()
    for term in ("adversarial", "adaptive_weight", "critic", "critic_hinge", "critic_lecam"):
        assert (term in row) == on


def test_losses_run_under_autocast_close_to_float32():
    rows = []
    for enabled in (False, True):
        model = small_model()
        batch = small_batch(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.loss(model(batch), batch)
        loss.backward()
        rows.append(model.record.take())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for name, value in rows[0].items():
        assert torch.isclose(rows[1][name], value, rtol=0.1, atol=0.05), name


def test_weights_of_zero_switch_losses_off():
    model = small_model(replace(OBJECTIVE, lecam=0.0, consistency=0.0, entropy=0.0, alignment=0.0))
    batch = small_batch(4)
    model.loss(model(batch), batch).backward()
    row = model.record.take()
    assert torch.isclose(row["critic"], row["critic_hinge"])
    assert not {"critic_lecam", "critic_consistency", "entropy", "alignment"} & set(row)


class Norms(TorchDispatchMode):
    """Counts the norms of vectors that are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.linalg_vector_norm.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_heads_whose_weights_a_file_brings_iterate_no_spectral_norm(device):
    with Norms() as drawn:
        heads = CriticHeads(8, 1)
    with torch.device(device), Unfilled(), Norms() as unfilled:
        empty = CriticHeads(8, 1)
    convolutions = 3
    assert unfilled.count == 2 * convolutions  # of its two vectors, once
    assert drawn.count > 15 * unfilled.count
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (heads, empty)]
    assert shapes[0] == shapes[1]
