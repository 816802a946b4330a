"""The tokenizer as Composer trains it: one pass, and the losses of both players in one sum.

The release updates the generator, then the critic on the reconstruction made before that update:
neither update sees the other. So L_generator (critic's weights constant) plus L_critic
(reconstruction detached), one backward and one optimizer are the same algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lgm_scale.families.tokenizer import losses
from lgm_scale.families.tokenizer.assets import FrozenNets
from lgm_scale.families.tokenizer.config import TokenizerObjectiveConfig
from lgm_scale.families.tokenizer.critic import (
    CriticBackbone,
    CriticHeads,
    ReduceMean,
    critic_view,
    one_rank,
)
from lgm_scale.families.tokenizer.length_control import exploration_noise
from lgm_scale.families.tokenizer.losses import (
    alignment_loss,
    entropy_loss,
    perceptual_weight,
    pixel_loss,
    representation_loss,
)
from lgm_scale.families.tokenizer.network import Decoder, Tokenizer, TokenizerOutput
from lgm_scale.frozen import Frozen
from lgm_scale.pixels import to_unit_range
from lgm_scale.randomness import Purpose, keyed_uniforms, stream_keys
from lgm_scale.training.model import TrainingModel

LECAM_DECAY = 0.999

Terms = dict[str, Tensor]


class TokenizerTrainingModel(TrainingModel):
    """Reads batches {images uint8 [B, 3, S, S], sample_ids [B], step int, num_tokens}.

    num_tokens is an int, or with lengths.per_sample int64 [B].
    What is not linear in the batch (adaptive weight, LeCam's means, batch norm, code usage, mean
    similarity) is that of all ranks' samples; of one micro-batch, where there are several.

    Args:
        seed: Seed of exploration noise and of what the critic sees.
        auxiliary: Predicts the teacher's features from the latents; None without that loss.
        critic: Trained heads on the frozen critic's features; None without that loss.
        reduce_mean: Mean over ranks with a gradient, for what is not linear in the batch.
    """

    net: Tokenizer
    lecam_means: Tensor

    def __init__(
        self,
        net: Tokenizer,
        objective: TokenizerObjectiveConfig,
        seed: int,
        frozen: FrozenNets | None = None,
        auxiliary: Decoder | None = None,
        critic: CriticHeads | None = None,
        reduce_mean: ReduceMean = one_rank,
    ) -> None:
        super().__init__(net)
        self.auxiliary = auxiliary
        self.critic = critic
        self.objective = objective
        self.seed = seed
        self.frozen = frozen or FrozenNets()  # no module: outside parameters() and state_dict()
        self.reduce_mean = reduce_mean
        if critic is not None:
            # Moving averages of the mean logits of real images and of reconstructions.
            self.register_buffer("lecam_means", torch.zeros(2))

    def parameter_groups(self) -> dict[str, list[nn.Module]]:
        """The modules that each player of the game trains; their gradients are clipped apart."""
        groups: dict[str, list[nn.Module]] = {"generator": [self.net]}
        if self.auxiliary is not None:
            groups["generator"].append(self.auxiliary)
        if self.critic is not None:
            groups["critic"] = [self.critic]
        return groups

    def labels(self) -> dict[str, Any]:
        """Assets that random weights stand in for: the run means nothing then."""
        random = self.frozen.random_assets
        return {"random_assets": list(random)} if random else {}

    def below_zero(self) -> str:
        """Which terms have a sign, and what to look at instead of their sum."""
        quantizer = self.net.quantizer
        codes = 1 if quantizer is None else quantizer.codes.shape[1]
        least = {
            "entropy": f"from -{math.log(codes):.1f} on",
            "representation": "a cosine, from -1 on",
            "adversarial": "minus the critic's logit, without a bound",
        }
        signed = [f"{k} ({text})" for k, text in least.items() if getattr(self.objective, k) > 0]
        return (
            f"a loss below 0 is no error: {', '.join(signed)} may be negative; how good "
            "reconstructions are, pixel, perceptual and the PSNR of `evaluation` tell"
            if signed
            else ""
        )

    def read_elsewhere(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """Weights that a module of the losses reads of one inside it, whose forward never runs.

        ZeRO-3 gathers what runs; it finds such weights by itself in the model's forward alone.
        """
        if self.auxiliary is not None:
            for parameter in self.auxiliary.vit.parameters(recurse=False):
                yield self.auxiliary, parameter

    def forward(self, batch: dict[str, Any]) -> TokenizerOutput:
        """Reconstruct at the batch's K."""
        noise = exploration_noise(
            self.seed, batch["step"], self.net.num_base_tokens, self.objective.exploration_noise
        )
        return self.net(to_unit_range(batch["images"]), batch["num_tokens"], noise)

    def loss(self, outputs: TokenizerOutput, batch: dict[str, Any]) -> Tensor:
        """Weighted sum over both players. At K = N there is no alignment loss."""
        images = to_unit_range(batch["images"])
        pixel_part, terms = self._pixel_losses(outputs, images, batch)
        total = pixel_part
        for name, term in self._latent_losses(outputs, images, batch).items():
            total = total + getattr(self.objective, name) * term
            terms[name] = term
        record = {"loss": total, **terms}
        # Every parameter gets a gradient in every step (zero here), or DDP waits for it forever.
        if outputs.similarity is not None:
            total = total + 0.0 * outputs.similarity.sum()
        if self.critic is not None:
            critic_part, critic_terms = self._critic_losses(outputs, images, batch)
            record |= critic_terms
            total = total + critic_part
        self.record.add(len(images), record)
        return total

    def _pixel_losses(
        self, outputs: TokenizerOutput, images: Tensor, batch: dict[str, Any]
    ) -> tuple[Tensor, Terms]:
        """What reads the reconstruction. Its gradient is taken here, once, and handed on."""
        weights = self.objective
        reconstruction = outputs.reconstruction.detach().float().requires_grad_()
        terms = {"pixel": pixel_loss(reconstruction, images)}
        value = weights.pixel * terms["pixel"]
        if self.frozen.perceptual is not None:
            terms["perceptual"] = self.frozen.perceptual(reconstruction, images).mean()
            strength = perceptual_weight(
                weights.perceptual, batch["step"], weights.perceptual_warmup
            )
            value = value + strength * terms["perceptual"]
        (gradient,) = torch.autograd.grad(value, reconstruction)
        if self._adversarial(batch):
            terms["adversarial"] = losses.generator_loss(self._judge(reconstruction, batch, 0))
            (push,) = torch.autograd.grad(terms["adversarial"], reconstruction)
            terms["adaptive_weight"] = losses.adaptive_weight(
                self.net.patchify(gradient),
                self.net.patchify(push),
                outputs.last_hidden,
                self.reduce_mean,
            )
            strength = weights.adversarial * terms["adaptive_weight"]
            value = value + strength * terms["adversarial"]
            gradient = gradient + strength * push
        return losses.with_gradient(value, outputs.reconstruction, gradient), terms

    def _latent_losses(
        self, outputs: TokenizerOutput, images: Tensor, batch: dict[str, Any]
    ) -> Terms:
        """What reads codes, embeddings and latents; names are those of their weights."""
        terms: Terms = {}
        if outputs.code_logits is not None and self.objective.entropy > 0:
            terms["entropy"] = entropy_loss(outputs.code_logits, reduce_mean=self.reduce_mean)
        if self.auxiliary is not None:
            assert self.frozen.teacher is not None
            with torch.no_grad():
                features = self.frozen.teacher(images)
            prediction, _ = self.auxiliary(outputs.decoded_latents)
            terms["representation"] = representation_loss(prediction, features)
        similarity = outputs.similarity
        if similarity is None:  # no merge embeddings are learned
            return terms
        if self.objective.alignment > 0 and batch["num_tokens"] < self.net.num_base_tokens:
            terms["alignment"] = alignment_loss(
                outputs.z,
                similarity,
                self.net.merging.num_blocks,
                reduce_mean=self.reduce_mean,
            )
        return terms

    def _critic_losses(
        self, outputs: TokenizerOutput, images: Tensor, batch: dict[str, Any]
    ) -> tuple[Tensor, Terms]:
        """The critic's side, on the reconstruction as it is; zero before its start step."""
        assert self.critic is not None
        if not self._adversarial(batch):
            # A zero gradient, not none: DDP and FSDP wait for one, and the step count of the
            # optimizer's moments runs, as in the release.
            return 0.0 * self.critic(self.critic.idle_features(images.device)).sum(), {}
        weights = self.objective
        fakes = outputs.reconstruction.detach().float()
        real, fake = self._judge(images, batch, 1), self._judge(fakes, batch, 2)
        terms = {"critic_hinge": losses.hinge_loss(real, fake)}
        total = terms["critic_hinge"]
        means = self.reduce_mean(torch.stack((real.detach().mean(), fake.detach().mean())))
        self.lecam_means.lerp_(means, 1 - LECAM_DECAY)
        terms["logits_real"], terms["logits_fake"] = means.unbind()
        if weights.lecam > 0:
            terms["critic_lecam"] = losses.lecam_loss(
                real, fake, *self.lecam_means.clone().unbind()
            )
            total = total + weights.lecam * terms["critic_lecam"]
        if weights.consistency > 0:
            keys = stream_keys(self.seed, Purpose.DIFF_AUGMENT, batch["step"], batch["sample_ids"])
            count = losses.NUM_AUGMENT_DRAWS
            draws = keyed_uniforms(keys, 2 * count)
            real_seen = self._judge(losses.diff_augment(images, draws[:, :count]), batch, 3)
            fake_seen = self._judge(losses.diff_augment(fakes, draws[:, count:]), batch, 4)
            terms["critic_consistency"] = losses.consistency_loss(
                torch.cat((real, fake)), torch.cat((real_seen, fake_seen))
            )
            total = total + weights.consistency * terms["critic_consistency"]
        return total, {"critic": total, **terms}

    def _adversarial(self, batch: dict[str, Any]) -> bool:
        """Whether both players of the adversarial game are on in this step."""
        return self.critic is not None and batch["step"] >= self.objective.adversarial_start

    def _judge(self, images: Tensor, batch: dict[str, Any], call: int) -> Tensor:
        """Logits [B, L]. What the critic sees of a batch differs per call, not per rank."""
        assert self.critic is not None
        assert isinstance(self.frozen.critic, Frozen)
        backbone = self.frozen.critic.module
        assert isinstance(backbone, CriticBackbone)
        rng = np.random.default_rng([self.seed, int(Purpose.CRITIC_VIEW), batch["step"], call])
        return self.critic(self.frozen.critic(critic_view(images, backbone.image_size, rng)))
