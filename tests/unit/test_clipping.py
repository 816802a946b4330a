"""Groups are clipped apart, and one optimizer for both is the authors' alternation of two."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer.core import Event
from small_tokenizer import OBJECTIVE, OPTIMIZER, small_batch, small_model

from lgm_scale.build import build_optimizer
from lgm_scale.families.tokenizer.critic import critic_view
from lgm_scale.families.tokenizer.length_control import exploration_noise
from lgm_scale.families.tokenizer.losses import alignment_loss, diff_augment, entropy_loss
from lgm_scale.families.tokenizer.training import TokenizerTrainingModel
from lgm_scale.merging.tree import MergeTree
from lgm_scale.randomness import Purpose, keyed_uniforms, stream_keys
from lgm_scale.training.clipping import GroupClipping

NUM_STEPS = 20
CLIP_NORM = 0.05  # below both groups' norms: clipping them together would show


class OneOptimizer:
    """Ours."""

    def __init__(self, model: TokenizerTrainingModel) -> None:
        self.model = model
        self.optimizer = build_optimizer(OPTIMIZER, model.parameter_groups())
        self.clipping = GroupClipping(model.parameter_groups(), CLIP_NORM, model.record)

    def step(self, batch) -> dict[str, float]:
        self.optimizer.zero_grad()
        self.model.loss(self.model(batch), batch).backward()
        self.clipping.apply(Event.AFTER_TRAIN_BATCH, None, None)  # type: ignore[arg-type]
        self.optimizer.step()
        return {name: float(value) for name, value in self.model.record.take().items()}


class Alternation:
    """The authors': two optimizers, plain backward passes, the generator before the critic."""

    def __init__(self, model: TokenizerTrainingModel) -> None:
        self.model = model
        groups = model.parameter_groups()
        self.generator = build_optimizer(OPTIMIZER, {"generator": groups["generator"]})
        self.critic = build_optimizer(OPTIMIZER, {"critic": groups["critic"]})
        self.mean_real = self.mean_fake = torch.zeros(())

    def judge(self, images, batch, call):
        rng = np.random.default_rng([0, int(Purpose.CRITIC_VIEW), batch["step"], call])
        return self.model.critic(self.model.frozen.critic(critic_view(images, 24, rng)))

    def step(self, batch) -> dict[str, float]:
        images = batch["images"].float() / 127.5 - 1
        reconstruction, row = self.generator_step(images, batch)
        return row | self.critic_step(images, reconstruction.detach(), batch)

    def generator_step(self, images, batch):
        net, step = self.model.net, batch["step"]
        self.generator.zero_grad()
        out = net(images, batch["num_tokens"], exploration_noise(0, step, 16))
        x = out.reconstruction
        pixel, perceptual = F.mse_loss(x, images), self.model.frozen.perceptual(x, images).mean()
        rest = pixel + min(1, step / 4) * perceptual
        total = rest + 0.01 * entropy_loss(out.code_logits)
        prediction = self.model.auxiliary(out.decoded_latents)[0]
        features = self.model.frozen.teacher(images)
        total = total - F.cosine_similarity(prediction, features, dim=-1).mean()
        if batch["num_tokens"] < 16:
            total = total + 0.25 * alignment_loss(out.z, out.similarity, 4)
        row = {"pixel": float(pixel)}
        if step >= 2:
            self.model.critic.requires_grad_(False)
            adversarial = -self.judge(x, batch, 0).mean()
            self.model.critic.requires_grad_(True)
            weight = net.decoder.out.weight
            (push,) = torch.autograd.grad(adversarial, weight, retain_graph=True)
            (pull,) = torch.autograd.grad(rest, weight, retain_graph=True)
            balance = (pull.norm() / (push.norm() + 1e-4)).clamp(0, 1e4).detach()
            total = total + 0.4 * balance * adversarial
            row |= {"adversarial": float(adversarial), "adaptive_weight": float(balance)}
        (total + 0 * out.similarity.sum()).backward()
        parameters = [p for group in self.generator.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        self.generator.step()
        return x, row | {"loss": float(total)}

    def critic_step(self, images, fakes, batch) -> dict[str, float]:
        self.critic.zero_grad()
        parameters = [p for group in self.critic.param_groups for p in group["params"]]
        if batch["step"] < 2:  # the release runs the critic, times zero
            self.model.critic(self.model.critic.idle_features(images.device))
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.critic.step()
            return {}
        real, fake = self.judge(images, batch, 1), self.judge(fakes, batch, 2)
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        self.mean_real = 0.999 * self.mean_real + 0.001 * real.mean().detach()
        self.mean_fake = 0.999 * self.mean_fake + 0.001 * fake.mean().detach()
        lecam = F.relu(real - self.mean_fake).square().mean()
        lecam = lecam + F.relu(self.mean_real - fake).square().mean()
        keys = stream_keys(0, Purpose.DIFF_AUGMENT, batch["step"], batch["sample_ids"])
        draws = keyed_uniforms(keys, 14)
        seen = torch.cat(
            (
                self.judge(diff_augment(images, draws[:, :7]), batch, 3),
                self.judge(diff_augment(fakes, draws[:, 7:]), batch, 4),
            )
        )
        consistency = F.mse_loss(torch.cat((real, fake)), seen)
        total = hinge + 0.001 * lecam + 4 * consistency
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        self.critic.step()
        return {
            "critic": float(total),
            "critic_lecam": float(lecam),
            "critic_consistency": float(consistency),
        }


def weights_of(model: TokenizerTrainingModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def float64(monkeypatch):
    """Everything in float64: Adam turns the rounding noise of vanishing gradients into steps."""
    cut = MergeTree.assignment

    def wide_cut(tree, *args):
        assignment = cut(tree, *args)
        members = F.one_hot(assignment.labels, assignment.num_tokens).double()
        return dataclasses.replace(assignment, pool=members / assignment.sizes)

    monkeypatch.setattr(MergeTree, "assignment", wide_cut)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_one_optimizer_equals_the_authors_alternation():
    ours, theirs = OneOptimizer(small_model()), Alternation(small_model())
    start = weights_of(ours.model)
    assert torch.equal(start, weights_of(theirs.model))
    for step in range(NUM_STEPS):
        row, expected = ours.step(small_batch(step)), theirs.step(small_batch(step))
        assert expected.keys() <= row.keys()
        for name, value in expected.items():
            assert abs(row[name] - value) <= 1e-6, (step, name)
    moved = (weights_of(ours.model) - start).abs().max()
    difference = (weights_of(ours.model) - weights_of(theirs.model)).abs().max()
    print(f"moved {moved:.2g}, difference {difference:.2g}")
    assert moved > 1e-3
    assert difference <= 1e-6


def test_groups_are_clipped_apart():
    model = small_model()
    batch = small_batch(3)
    model.loss(model(batch), batch).backward()
    GroupClipping(model.parameter_groups(), CLIP_NORM, model.record).apply(
        Event.AFTER_TRAIN_BATCH,
        None,
        None,  # type: ignore[arg-type]
    )
    for name, modules in model.parameter_groups().items():
        gradients = [
            p.grad.flatten() for m in modules for p in m.parameters() if p.grad is not None
        ]
        assert model.record.notes()[f"gradient_norm_{name}"] > CLIP_NORM
        assert torch.isclose(torch.cat(gradients).norm(), torch.tensor(CLIP_NORM), rtol=1e-3)


def test_every_parameter_has_a_group_and_a_gradient():
    for step in (0, 2, 3):  # before the critic starts, K = N, all on
        model = small_model()
        batch = small_batch(step)
        model.loss(model(batch), batch).backward()
        owned = {
            p
            for modules in model.parameter_groups().values()
            for m in modules
            for p in m.parameters()
        }
        assert owned == set(model.parameters())
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_generators_loss_leaves_the_critic_alone():
    """Without the critic's own losses its gradient is zero, though it judged."""
    model = small_model()
    batch = small_batch(OBJECTIVE.adversarial_start)
    outputs = model(batch)
    images = batch["images"].float() / 127.5 - 1
    part, terms = model._pixel_losses(outputs, images, batch)
    part.backward()
    assert "adversarial" in terms
    assert all(p.grad is None for p in model.critic.parameters())  # type: ignore[union-attr]
    assert model.net.decoder.out.weight.grad is not None
