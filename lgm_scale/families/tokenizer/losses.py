"""Losses of the tokenizer: those of its latents and pixels, then those of the adversarial game.

One function each, of tensors alone: weights, start steps and frozen networks are the training
model's. What is not linear in the batch takes `reduce_mean`, so that its value and gradient are
those of the global batch on any number of ranks.

Source: LGM paper and release: SoftVQ's losses plus the alignment loss; SoftVQ's critic recipe
(hinge loss, LeCam, consistency under DiffAugment) with VQGAN's adaptive weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lgm_scale.families.tokenizer.critic import ReduceMean, one_rank
from lgm_scale.merging.tree import cosine_similarity

NUM_AUGMENT_DRAWS = 7
"""Uniform numbers that `diff_augment` takes per image."""


def pixel_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error. Shapes: two of [B, 3, S, S] in [-1, 1] -> scalar."""
    return F.mse_loss(reconstruction.float(), images.float())


def perceptual_weight(weight: float, step: int, warmup: int) -> float:
    """Linear warm-up: weight * min(1, step / warmup), with warmup in steps and 0 for none."""
    return weight * min(1.0, step / warmup) if warmup else weight


def representation_loss(prediction: Tensor, features: Tensor) -> Tensor:
    """Minus the cosine of predicted and teacher features, mean over patches.

    Shapes: two of [B, P, F] -> scalar in [-1, 1].
    Source: LGM release, after SoftVQ's alignment to DINOv2.
    """
    return -F.cosine_similarity(prediction.float(), features.float(), dim=-1).mean()


def entropy_loss(
    code_logits: Tensor, temperature: float = 0.01, reduce_mean: ReduceMean = one_rank
) -> Tensor:
    """Certain per token, diverse over the batch: mean entropy(q) - entropy(mean q).

    The first part alone would choose one code for all tokens; the second keeps all codes in use.

    Shapes: code_logits [num_codebooks, M, codes] (cosines) -> scalar. As in the release, the
    mean q runs over all tokens of all segments, code i of every book counting as one.
    Source: SoftVQ and the LGM release, constants included.
    """
    sharp = code_logits.float() / temperature
    q = torch.softmax(sharp, dim=-1)
    log_q = torch.log_softmax(sharp + 1e-5, dim=-1)
    per_token = -(q * log_q).sum(-1).mean()
    # The logarithm of a mean is not the mean of logarithms: over all ranks first.
    usage = reduce_mean(q.mean((0, 1)))  # [codes]
    return per_token + (usage * torch.log(usage + 1e-6)).sum()


def alignment_loss(
    z: Tensor,
    similarity: Tensor,
    num_blocks: int,
    margin: float = 0.25,
    reduce_mean: ReduceMean = one_rank,
) -> Tensor:
    """Pull the embeddings' similarities to those of the latents they stand for.

    The margin leaves room for the reconstruction to decide: what is about right is not pushed.

    Mean over in-block pairs of relu(|C - S| - margin), C the batch mean of the latents' cosine
    similarities (detached), S that of the merge embeddings.

    Shapes: z [B, N, D], similarity [N, N] -> scalar.
    Source: LGM paper, alignment loss.
    """
    with torch.autocast(z.device.type, enabled=False):
        # Detached: embeddings follow the latents, and no latent is bent to suit the tree.
        target = reduce_mean(cosine_similarity(z.detach()).mean(0))  # [N, N]
        excess = torch.relu((target - similarity).abs() - margin)  # [N, N]
        # Not by a mask, whose size the host would wait for: blocks are squares on the diagonal.
        blocks = (num_blocks, len(similarity) // num_blocks)  # of M tokens
        inside = (
            excess.unflatten(0, blocks).unflatten(2, blocks).diagonal(0, 0, 2)
        )  # [M, M, blocks]
        return inside.permute(2, 0, 1).flatten().mean()


# --- the adversarial game ---------------------------------------------------------------------


def generator_loss(fake: Tensor) -> Tensor:
    """Minus the mean logit of reconstructions. Shapes: any -> scalar."""
    return -fake.mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half of mean relu(1 - real) + mean relu(1 + fake). Shapes: logits of any shape -> scalar."""
    # A logit beyond its margin has no gradient: the critic is done with what it tells apart.
    return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())


def lecam_loss(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """Keep logits from running away from the moving averages of the other side.

    Shapes: logits of any shape, moving averages of their means [] -> scalar.
    Source: Tseng et al. 2021.
    """
    above = torch.relu(real - mean_fake).square().mean()
    return above + torch.relu(mean_real - fake).square().mean()


def consistency_loss(clean: Tensor, augmented: Tensor) -> Tensor:
    """Squared difference of logits with and without DiffAugment; the gradient reaches both.

    Shapes: two of [2 * B, L], real images and reconstructions together -> scalar.
    """
    return F.mse_loss(clean, augmented)


def adaptive_weight(
    reconstruction_gradient: Tensor,
    adversarial_gradient: Tensor,
    hidden: Tensor,
    reduce_mean: ReduceMean = one_rank,
    limit: float = 1e4,
) -> Tensor:
    """Ratio of the two losses' gradient norms at the last decoder layer's weight W.

        d = |grad_W (pixel + perceptual)| / (|grad_W adversarial| + 1e-4), in [0, limit]

    That layer is linear, out = W h + b, so the gradient to W is sum (dL/dout) h^T: no parameter
    gradient is asked for, and sharding does not matter. Norms are those of the global batch.

    Shapes: gradients with respect to out [B, P, O], hidden h [B, P, C] -> [], no gradient.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        # [2, B P, O]: every patch of every image is one row of the linear layer's batch.
        both = torch.stack((reconstruction_gradient, adversarial_gradient)).float().flatten(1, 2)
        at_weight = both.transpose(1, 2) @ hidden.detach().float().flatten(0, 1)  # [2, O, C]
        # Gradients are averaged over ranks before a norm is taken, as the optimizer's are.
        norms = reduce_mean(at_weight).flatten(1).norm(dim=1)
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, limit).detach()


def with_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to x is known already.

    Lets the perceptual net and the critic run backward once, for the adaptive weight and for the
    step alike; and the critic's weights, which are not on the way, stay constant.

    Shapes: value [], x and gradient of one shape -> [].
    """
    return _WithGradient.apply(value.detach(), x, gradient)  # type: ignore[return-value]  # untyped


class _WithGradient(torch.autograd.Function):
    """The value in forward, the known gradient times what comes from above in backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, (upstream[0] * gradient).to(ctx.dtype), None


def diff_augment(images: Tensor, draws: Tensor) -> Tensor:
    """Colour, translation by up to an eighth, and one square of half the side cut out.

    Shapes: images [B, 3, S, S], draws [B, 7] uniform in (0, 1) -> [B, 3, S, S].
    Source: Zhao et al. 2020, policy colour, translation, cutout (0.5), always applied.
    """
    # In tensors alone, image by image: nothing waits for the host, and gradients pass.
    brightness, saturation, contrast, *places = draws.to(images.dtype).unbind(1)
    # Added brightness +-0.5, colour around grey times 0 to 2, contrast around the mean 0.5 to 1.5.
    x = images + (brightness - 0.5).view(-1, 1, 1, 1)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation).view(-1, 1, 1, 1) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (contrast + 0.5).view(-1, 1, 1, 1) + mean
    return _cut_out(_translate(x, places[0], places[1]), places[2], places[3])


def _translate(x: Tensor, down: Tensor, right: Tensor, ratio: float = 0.125) -> Tensor:
    """Shift each image by its own whole number of pixels; zeros come in."""
    size = x.shape[-1]
    reach = int(size * ratio + 0.5)
    for dim, draw in ((2, down), (3, right)):
        shift = (draw * (2 * reach + 1)).long() - reach  # [B], in [-reach, reach]
        source = torch.arange(size, device=x.device) - shift[:, None]  # [B, S]
        inside = (source >= 0) & (source < size)
        index = _along(source.clamp(0, size - 1), dim).expand_as(x)
        x = x.gather(dim, index) * _along(inside, dim)
    return x


def _cut_out(x: Tensor, down: Tensor, right: Tensor, ratio: float = 0.5) -> Tensor:
    """Zero a square around a centre anywhere in the image."""
    size = x.shape[-1]
    side = int(size * ratio + 0.5)
    within = []
    for dim, draw in ((2, down), (3, right)):
        first = (draw * (size + 1 - side % 2)).long() - side // 2  # [B]
        place = torch.arange(size, device=x.device) - first[:, None]  # [B, S]
        # The centre is drawn, not the corner: a square may reach over the border.
        within.append(_along((place >= 0) & (place < side), dim))
    return x * ~(within[0] & within[1])


def _along(values: Tensor, dim: int) -> Tensor:
    """[B, S] -> [B, 1, S, 1] (dim 2) or [B, 1, 1, S] (dim 3)."""
    return values[:, None, :, None] if dim == 2 else values[:, None, None, :]
