"""Token Merging on latents: which tokens of *one image* are alike, by bipartite soft matching.

All images of a batch are merged at once, with tensors of fixed shape and no host synchronisation.

Source: Bolya et al., "Token Merging: Your ViT But Faster" (ToMe), section 3. There it runs in
every block of a transformer; here it is iterated on the latents until K tokens are left.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def merges_per_round(tokens: int, num_tokens: int, num_blocks: int, share: float) -> int:
    """How many of `tokens` clusters one round merges away, on the way to K.

    Rounds may take at most half of what can merge. Each block of n clusters offers ceil(n / 2)
    of them (none for n = 1), so the count is available in every image, however its clusters are
    spread over the blocks: all images keep equally many.
    """
    return min(tokens - num_tokens, math.ceil((tokens - num_blocks + 1) * share))


@torch.no_grad()
def bipartite_labels(z: Tensor, num_tokens: int, num_blocks: int, share: float = 0.25) -> Tensor:
    """Cluster the tokens of each image.

    A round splits the clusters of a block alternately into sources and targets, links each source
    to its most similar target (cosine of the means), and merges along the strongest links of the
    whole image.

    Shapes: z [B, N, D] -> labels [B, N] int64: the target token whose cluster a token is in; K
    different ones per image, none across blocks. num_blocks <= K <= N; share in (0, 0.5]: a
    quarter kept more of the latents' variance at demo scale than a half, an eighth no more.
    Source: ToMe, bipartite soft matching.
    """
    batch, size, _ = z.shape
    block = torch.arange(size, device=z.device) // (size // num_blocks)  # [N]
    within = block[:, None] == block[None, :]  # [N, N]
    own = torch.arange(size, device=z.device).expand(batch, -1)  # [B, N]
    labels, tokens = own, size
    while tokens > num_tokens:
        count = merges_per_round(tokens, num_tokens, num_blocks, share)
        member = F.one_hot(labels, size).float()  # [B, N, N]; column j is empty once j is merged
        alive = member.any(1)  # [B, N]
        # Alternate clusters, so that each has near neighbours on the other side. Sources link to
        # targets only: no chain of merges can form in a round, so all are made at once.
        rank = alive.view(batch, num_blocks, -1).cumsum(-1).view(batch, size)  # 1, 2, ... in block
        source, target = alive & (rank % 2 == 1), alive & (rank % 2 == 0)
        unit = F.normalize(member.transpose(1, 2) @ z.float(), dim=-1)  # directions of the means
        link = (unit @ unit.transpose(1, 2)).masked_fill(
            ~(source[:, :, None] & target[:, None, :] & within), -torch.inf
        )
        strength, nearest = link.max(-1)  # [B, N]; -inf of what is no source sorts last
        chosen = strength.topk(count).indices  # [B, count]
        # Each chosen source takes its target as parent, everyone else themselves.
        parent = own.scatter(1, chosen, nearest.gather(1, chosen))
        labels = parent.gather(1, labels)
        tokens -= count
    return labels


def spread_means(z: Tensor, labels: Tensor) -> Tensor:
    """Give every token the mean of its cluster, image by image.

    Matrix products, not scatters: the result is deterministic on a GPU, too.

    Shapes: z [B, N, D], labels [B, N] int64 in [0, N) -> [B, N, D], in z's dtype.
    """
    with torch.autocast(z.device.type, enabled=False):  # means keep z's precision
        member = F.one_hot(labels, z.shape[1]).to(z.dtype)  # [B, N, N]
        sizes = member.sum(1).clamp_min(1)  # [B, N]
        means = (member.transpose(1, 2) @ z) / sizes[..., None]
        return member @ means
