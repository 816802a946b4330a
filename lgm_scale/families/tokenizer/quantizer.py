"""Soft quantization: each token becomes a softmax-weighted mean of codebook entries.

Why soft: the mean is differentiable, so there is no straight-through estimate of a choice and no
commitment or codebook loss; the gradient reaches the codes through the weighted mean itself. The
latents stay continuous, which is what a diffusion model wants, and are bounded by the codes.

Source: SoftVQ-VAE, as used by the LGM release.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftQuantizer(nn.Module):
    """One codebook per segment of the token sequence: softmax(z c^T / temperature) c, normalised.

    Args:
        num_codebooks: Segments; tokens are split among them in order. The same segments are the
            blocks within which tokens may merge.
        codebook_size: Codes per book.
        dim: D, of tokens and codes.
        temperature: Divides the cosines in the softmax; at 0.07 a few codes share a token.
    """

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        dim: int,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.num_codebooks = num_codebooks
        self.temperature = temperature
        self.codes = nn.Parameter(torch.empty(num_codebooks, codebook_size, dim))
        self.initialize()

    def initialize(self) -> None:
        """Draw the codes, uniform in +-1 / codebook_size; only their directions are ever used."""
        bound = 1.0 / self.codes.shape[1]
        nn.init.uniform_(self.codes, -bound, bound)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize, and return the logits that the entropy term reads.

        Shapes: z [B, N, D] -> quantized [B, N, D], logits [S, B * N / S, codes] (cosines).
        """
        batch, tokens, dim = z.shape
        # Segment by segment, the tokens of all images in a row: one product per codebook.
        segments = z.view(batch, self.num_codebooks, -1, dim).transpose(0, 1).flatten(1, 2)
        codes = F.normalize(self.codes, dim=-1)  # [S, codes, D]
        # Detached: codes learn from what is made of them. Else the entropy loss could sharpen the
        # softmax by moving the codes to the tokens.
        logits = F.normalize(segments, dim=-1) @ codes.detach().transpose(1, 2)
        weights = torch.softmax(logits / self.temperature, dim=-1)  # [S, B N / S, codes], as logits
        mixed = (weights @ codes).view(self.num_codebooks, batch, -1, dim)  # [S, B, N / S, D]
        return mixed.transpose(0, 1).reshape(batch, tokens, dim), logits
