"""The tokenizer as Composer trains it: one pass, the weighted sum of its losses."""

from __future__ import annotations

from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor

from lgm_scale.models.length_control import exploration_noise
from lgm_scale.models.tokenizer import Tokenizer, TokenizerOutput
from lgm_scale.objectives.reconstruction import alignment_loss, entropy_loss, pixel_loss
from lgm_scale.training.record import LossRecord

__all__ = ["TokenizerModel", "to_unit_range"]


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 pixels to [-1, 1] float32. Any shape."""
    return images.float() / 127.5 - 1.0


class TokenizerModel(ComposerModel):
    """Reads batches {images uint8 [B, 3, S, S], step int, num_tokens int (or int64 [B])}.

    Args:
        net: The tokenizer; a direct child, which is what Composer's sharding wraps.
        weights: Weight per loss: pixel, entropy, alignment.
        exploration: Scale of the noise on similarities.
        seed: Of the exploration noise.
    """

    def __init__(
        self, net: Tokenizer, weights: dict[str, float], exploration: float, seed: int
    ) -> None:
        super().__init__()
        self.net = net
        self.loss_weights = weights
        self.exploration = exploration
        self.seed = seed
        self.record = LossRecord()

    def forward(self, batch: dict[str, Any]) -> TokenizerOutput:
        """Reconstruct at the batch's K."""
        noise = exploration_noise(
            self.seed, batch["step"], self.net.num_base_tokens, self.exploration
        )
        return self.net(to_unit_range(batch["images"]), batch["num_tokens"], noise)

    def loss(self, outputs: TokenizerOutput, batch: dict[str, Any]) -> Tensor:
        """Weighted sum. At K = N nothing merges, and there is no alignment loss."""
        terms = {
            "pixel": pixel_loss(outputs.reconstruction, to_unit_range(batch["images"])),
            "entropy": entropy_loss(outputs.code_logits),
        }
        similarity = outputs.similarity
        if similarity is not None and batch["num_tokens"] < self.net.num_base_tokens:
            terms["alignment"] = alignment_loss(outputs.z, similarity, self.net.merging.num_blocks)
        total = torch.stack([self.loss_weights[name] * term for name, term in terms.items()]).sum()
        self.record.add(len(batch["images"]), {"loss": total, **terms})
        # Every parameter gets a gradient in every step (zero here), or DDP waits for it forever.
        return total if similarity is None else total + 0.0 * similarity.sum()
