"""How a tokenizer reaches K tokens: learnable global merging, and what it is compared with.

    lgm        one learned tree for all images                           (the method)
    fixed      one random tree for all images, not learned               (ablation)
    tome       tokens of each image merged by their own similarity       (Token Merging)
    truncate   the first K tokens kept, the rest dropped                 (nested dropout)
    none       no control: K = N

The decoder always reads N latents. After merging these are the cluster means, spread over the
members; after truncation, zeros (or a learned token) from position K on.

Source: LGM paper. Constants of the release: 768-dimensional embeddings, exploration noise 0.1,
straight-through temperature 0.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgm_scale.errors import ConfigError
from lgm_scale.families.tokenizer.bipartite_merging import bipartite_labels, spread_means
from lgm_scale.merging.linkage import in_block_triangle, start_host_copy
from lgm_scale.merging.tree import MergeTree, cosine_similarity, straight_through_merge
from lgm_scale.randomness import Purpose

GrowTree = Callable[[], MergeTree]


def exploration_noise(seed: int, step: int, num_tokens: int, scale: float = 0.1) -> np.ndarray:
    """Noise on the similarities of one training step: [N * (N - 1) / 2] float64.

    A function of (seed, step) alone: every rank grows the same tree.
    """
    # On the host, where the clustering is; clipped, as in the release: no pair moves by more.
    rng = np.random.default_rng([seed, int(Purpose.EXPLORATION), step])
    count = num_tokens * (num_tokens - 1) // 2
    return scale * np.clip(rng.standard_normal(count), -1.0, 1.0)


class LengthControl(nn.Module):
    """A way to N latents of which K are independent; this base holds what every way offers.

    Args:
        num_base_tokens: N.
        num_blocks: Blocks within which tokens may merge (the codebook segments).
    """

    name: ClassVar[str]
    has_tree: ClassVar[bool] = False
    """Whether one merge tree serves all images. A generator needs it."""

    def __init__(self, num_base_tokens: int, num_blocks: int) -> None:
        super().__init__()
        self.num_base_tokens = num_base_tokens
        self.num_blocks = num_blocks
        self.min_tokens = num_blocks  # the least K: one token per block

    def lattice_order(self) -> Tensor:
        """Where in the image each latent starts, with `latent_init: aligned`: [N] int64."""
        return torch.arange(self.num_base_tokens)

    def start_tree(self, exploration: np.ndarray | None = None) -> GrowTree | None:
        """Begin what a step's tree needs, before the encoder is queued; the result finishes it."""
        return None

    def forward(self, z: Tensor, num_tokens: int | Tensor, tree: GrowTree | None = None) -> Tensor:
        """What the decoder reads in training at K tokens; as in evaluation, unless said otherwise.

        Shapes: z [B, N, D] -> [B, N, D]. `tree` is what `start_tree` returned.
        """
        return self.full_length(z, num_tokens)

    def full_length(self, z: Tensor, num_tokens: int | Tensor) -> Tensor:
        """The full-length equivalent of the latents at K tokens, A z_K: what the decoder reads.

        Shapes: z [B, N, D] -> [B, N, D]. Exact identity at K = N.
        Raises: ConfigError if K is out of range.
        """
        raise NotImplementedError

    def cluster_labels(self, z: Tensor, num_tokens: int) -> Tensor | None:
        """Cluster of each token of each image: z [B, N, D] -> [B, N] int64; None: no clusters."""
        return None

    def similarity(self) -> Tensor | None:
        """Similarities [N, N] that the alignment loss trains, with gradient; None: none learned."""
        return None

    def tree(self, exploration: np.ndarray | None = None) -> MergeTree:
        """The merge tree of all images.

        Raises: ConfigError from a control that has none.
        """
        raise ConfigError(
            f"model.length_control: {self.name!r} has no merge tree, and the generator needs one; "
            "train the tokenizer with 'lgm' (or 'fixed')"
        )

    def check(self, num_tokens: int | Tensor) -> None:
        """Raise a ConfigError if K is out of range, or one K per sample is not understood."""
        if isinstance(num_tokens, Tensor):
            raise ConfigError(
                f"lengths.per_sample: {self.name!r} runs at one K per batch; use 'truncate'"
            )
        if not self.min_tokens <= num_tokens <= self.num_base_tokens:
            raise ConfigError(
                f"num_tokens: {num_tokens} is outside [{self.min_tokens}, {self.num_base_tokens}], "
                f"the range of length control {self.name!r}"
            )


class LearnedMerging(LengthControl):
    """One learned embedding per token; clustering them gives the tree for all images.

    Why embeddings and not the latents: they are the same for every image, so one tree serves all
    images and generators; and they are trained, by the straight-through gradient of the
    reconstruction and by the alignment loss, so that tokens that are alike in most images merge.

    Source: LGM paper, learnable global merging.
    """

    name = "lgm"
    has_tree = True

    def __init__(self, num_base_tokens: int, num_blocks: int, embedding_dim: int = 768) -> None:
        super().__init__(num_base_tokens, num_blocks)
        self.embeddings = nn.Parameter(torch.empty(num_base_tokens, embedding_dim))
        self.initialize()

    def initialize(self) -> None:
        """Draw the embeddings as random unit vectors."""
        with torch.no_grad():
            self.embeddings.normal_()
            self.embeddings.copy_(F.normalize(self.embeddings, dim=-1))

    def start_tree(self, exploration: np.ndarray | None = None) -> GrowTree:
        """Similarities of the embeddings as they are now, on their way to the host."""
        similarity = cosine_similarity(self.embeddings.detach())  # [N, N]
        triangle = start_host_copy(in_block_triangle(similarity, self.num_blocks))
        return lambda: MergeTree.from_triangle(triangle(), self.num_base_tokens, exploration)

    def tree(self, exploration: np.ndarray | None = None) -> MergeTree:
        """The merge tree of the embeddings as they are now."""
        return self.start_tree(exploration)()

    def similarity(self) -> Tensor | None:
        """Cosine similarities of the embeddings [N, N], float32, with gradient."""
        return cosine_similarity(self.embeddings)

    def forward(self, z: Tensor, num_tokens: int | Tensor, tree: GrowTree | None = None) -> Tensor:
        """Merge to K tokens and expand again, with a gradient to the embeddings.

        Shapes: z [B, N, D] -> [B, N, D]. K = N means no merging at all: z itself.
        """
        self.check(num_tokens)
        if num_tokens == z.shape[1]:
            return z
        grow = tree or self.start_tree()
        # The encoder is queued by now: the host clusters while the GPU encodes.
        assignment = grow().assignment(int(num_tokens)).to(z.device)
        return straight_through_merge(z, self.embeddings, assignment)

    def full_length(self, z: Tensor, num_tokens: int | Tensor) -> Tensor:
        """Cluster means, spread over the members, A P^T z: z [B, N, D] -> [B, N, D]."""
        self.check(num_tokens)
        assignment = self.tree().assignment(int(num_tokens), z.device)
        return assignment.unmerge(assignment.merge(z))

    def cluster_labels(self, z: Tensor, num_tokens: int) -> Tensor | None:
        """Clusters of the one tree, the same in every image: z [B, N, D] -> [B, N] int64."""
        self.check(num_tokens)
        return self.tree().assignment(num_tokens, z.device).labels.expand(len(z), -1)


class FixedMerging(LearnedMerging):
    """A tree like that of `lgm` before its first step, and never another.

    The random embeddings come from torch's global generator, which a run seeds with its `seed`;
    they are a buffer, so bundles and resume states carry them.
    """

    name = "fixed"
    embeddings: Tensor

    def __init__(self, num_base_tokens: int, num_blocks: int, embedding_dim: int = 768) -> None:
        super().__init__(num_base_tokens, num_blocks, embedding_dim)
        embeddings = self.embeddings.detach()
        del self.embeddings  # a parameter no longer: no optimizer and no average may move it
        self.register_buffer("embeddings", embeddings)

    def similarity(self) -> Tensor | None:
        """None: nothing is trained, and there is no alignment loss."""
        return None

    def forward(self, z: Tensor, num_tokens: int | Tensor, tree: GrowTree | None = None) -> Tensor:
        """The plain cluster means, without exploration: z [B, N, D] -> [B, N, D]."""
        return self.full_length(z, num_tokens)


class BipartiteMerging(LengthControl):
    """Each image merges its own most similar tokens. Cluster means carry gradient, choices do not.

    Source: Token Merging (ToMe); the LGM paper's ablation 'per-image merging'.
    """

    name = "tome"

    def full_length(self, z: Tensor, num_tokens: int | Tensor) -> Tensor:
        """Means of each image's own clusters, over the members: z [B, N, D] -> [B, N, D]."""
        self.check(num_tokens)
        if num_tokens == z.shape[1]:
            return z
        return spread_means(z, bipartite_labels(z, int(num_tokens), self.num_blocks))

    def cluster_labels(self, z: Tensor, num_tokens: int) -> Tensor | None:
        """Clusters of each image by its own tokens: z [B, N, D] -> [B, N] int64."""
        self.check(num_tokens)
        return bipartite_labels(z, num_tokens, self.num_blocks)


class Truncation(LengthControl):
    """Keep the first K tokens. The decoder reads a filler at the other N - K positions.

    The filler is zero, which no quantized token is, or with `learned_filler` a trained vector
    [D]; position embeddings tell the decoder which token is missing in either case. Trained at
    random K, early tokens are kept most often, and so come to hold what matters most.

    Source: nested dropout (Rippel et al. 2014), on token sequences as in One-D-Piece and FlexTok.
    """

    name = "truncate"

    def __init__(
        self, num_base_tokens: int, num_blocks: int, latent_dim: int, learned_filler: bool = False
    ) -> None:
        super().__init__(num_base_tokens, num_blocks)
        self.min_tokens = 1  # nothing is merged, so blocks set no limit
        self.mask_token = nn.Parameter(torch.zeros(latent_dim)) if learned_filler else None

    def lattice_order(self) -> Tensor:
        """Places in a random order, so that the first K cover the image, not its top: [N] int64."""
        return torch.randperm(self.num_base_tokens, generator=torch.Generator().manual_seed(0))

    def full_length(self, z: Tensor, num_tokens: int | Tensor) -> Tensor:
        """The first K tokens, then the filler. K may be one per image: [B] int64."""
        if not isinstance(num_tokens, Tensor):
            self.check(num_tokens)
        kept = torch.as_tensor(num_tokens, device=z.device).reshape(-1, 1)  # [B, 1] or [1, 1]
        keep = torch.arange(z.shape[1], device=z.device) < kept
        filler = z.new_zeros(()) if self.mask_token is None else self.mask_token.to(z.dtype)
        return torch.where(keep[..., None], z, filler)


class FullLength(LengthControl):
    """No length control: a tokenizer for K = N alone."""

    name = "none"

    def __init__(self, num_base_tokens: int, num_blocks: int) -> None:
        super().__init__(num_base_tokens, num_blocks)
        self.min_tokens = num_base_tokens

    def full_length(self, z: Tensor, num_tokens: int | Tensor) -> Tensor:
        """The latents themselves: z [B, N, D] -> [B, N, D]."""
        self.check(num_tokens)
        return z


LENGTH_CONTROLS: dict[str, type[LengthControl]] = {
    control.name: control
    for control in (LearnedMerging, FixedMerging, BipartiteMerging, Truncation, FullLength)
}


def build_length_control(
    name: str, num_base_tokens: int, num_blocks: int, latent_dim: int, dropped_tokens: str
) -> LengthControl:
    """Build the length control of a name. Raises: ConfigError for an unknown one."""
    if name not in LENGTH_CONTROLS:
        known = ", ".join(LENGTH_CONTROLS)
        raise ConfigError(f"model.length_control: {name!r} is unknown; choose from {known}")
    if name == Truncation.name:
        return Truncation(num_base_tokens, num_blocks, latent_dim, dropped_tokens == "learned")
    return LENGTH_CONTROLS[name](num_base_tokens, num_blocks)
