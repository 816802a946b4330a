"""Losses of the tokenizer, one function each.

What is not linear in the batch takes `reduce_mean`, so that its value and gradient are those of the
global batch on any number of ranks. The adversarial losses are in `objectives.adversarial`.

Source: LGM paper and release (SoftVQ's losses plus the alignment loss).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lgm_scale.families.tokenizer.critic import ReduceMean, one_rank
from lgm_scale.merging.tree import cosine_similarity, in_block_pairs

__all__ = [
    "alignment_loss",
    "entropy_loss",
    "perceptual_weight",
    "pixel_loss",
    "representation_loss",
]


def pixel_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error. Shapes: [B, 3, S, S] in [-1, 1], twice -> scalar."""
    return F.mse_loss(reconstruction.float(), images.float())


def perceptual_weight(weight: float, step: int, warmup: int) -> float:
    """Linear warm-up: weight * min(1, step / warmup)."""
    return weight * min(1.0, step / warmup) if warmup else weight


def representation_loss(prediction: Tensor, features: Tensor) -> Tensor:
    """Minus the cosine of predicted and teacher features, mean over patches.

    Shapes: [B, P, F] twice -> scalar in [-1, 1].
    """
    return -F.cosine_similarity(prediction.float(), features.float(), dim=-1).mean()


def entropy_loss(
    code_logits: Tensor, temperature: float = 0.01, reduce_mean: ReduceMean = one_rank
) -> Tensor:
    """Certain per token, diverse over the batch: mean entropy(q) - entropy(mean q).

    Shapes: code_logits [num_codebooks, M, codes] (cosines) -> scalar. As in the release, the
    mean q runs over all tokens of all segments, code i of every book counting as one.
    """
    sharp = code_logits.float() / temperature
    q = torch.softmax(sharp, dim=-1)
    log_q = torch.log_softmax(sharp + 1e-5, dim=-1)
    per_token = -(q * log_q).sum(-1).mean()
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

    Mean over in-block pairs of relu(|C - S| - margin), C the batch mean of the latents' cosine
    similarities (detached), S that of the merge embeddings.

    Shapes: z [B, N, D], similarity [N, N] -> scalar.
    Source: LGM paper, alignment loss.
    """
    with torch.autocast(z.device.type, enabled=False):
        target = reduce_mean(cosine_similarity(z.detach()).mean(0))
        excess = torch.relu((target - similarity).abs() - margin)
    return excess[in_block_pairs(len(similarity), num_blocks, z.device)].mean()
