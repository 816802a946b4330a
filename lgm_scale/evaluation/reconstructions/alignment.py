"""How much the latents of one image agree across token lengths, and how alike merged tokens are.

Works for every length control: what is compared is the full-length equivalent A z_K, which the
decoder reads.

Source: CKNNA is from Huh et al. 2024, "The Platonic Representation Hypothesis"; that a tokenizer
of aligned lengths is easier to generate for is the LGM paper's finding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.images import StoredImages
from lgm_scale.merging.tree import cosine_similarity, in_block_pairs
from lgm_scale.pixels import to_unit_range
from lgm_scale.protocols import ImageTokenizer

DEFINITIONS = {
    "cknna": "paper's text: centred, then masked to mutual neighbours",
    "cknna_code": "authors' code: masked to mutual neighbours, then unbiased HSIC",
}
"""CKNNA's two definitions, up to some 0.03 apart, by their keys in results."""


def cknna(a: Tensor, b: Tensor, num_neighbors: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment of two representations of the same M images.

    With K_ij = <a_i, a_j> - mean_l <a_i, a_l>, L_ij likewise for b, and w_ij = 1 where j is among
    the k nearest neighbours of i (itself left out) in a *and* in b:

        align(a, b) = sum_ij w_ij K_ij L_ij,   CKNNA = align(a, b) / sqrt(align(a, a) align(b, b)).

    Rows are L2-normalised first, as the authors do, so the nearest neighbour is the one of
    greatest cosine. 1 for equal representations, and unchanged by rotation and scaling of either.

    Shapes: a [M, F], b [M, G] -> a number. Raises: ConfigError unless M > k.
    Source: Huh et al. 2024, section on measuring alignment and its appendix.
    """
    matrix = cknna_matrix([a, b], num_neighbors)
    return float(matrix[0, 1])


def cknna_matrix(representations: Sequence[Tensor], num_neighbors: int = 10) -> Tensor:
    """CKNNA of every pair. Shapes: L times [M, F] -> [L, L] float64, ones on the diagonal."""
    kernels = torch.stack([_neighbor_kernel(each, num_neighbors) for each in representations])
    flat = kernels.flatten(1)  # zero outside the neighbourhoods: products are restricted to both
    align = flat @ flat.T
    scale = align.diagonal().sqrt()
    return align / scale[:, None] / scale[None, :]


def _neighbor_kernel(features: Tensor, num_neighbors: int) -> Tensor:
    """Row-centred inner products, zero outside the k nearest neighbours: [M, F] -> [M, M]."""
    kernel, near = _neighbors(features, num_neighbors)
    return near * (kernel - kernel.mean(1, keepdim=True))


def _neighbors(features: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """Cosines of all pairs, and 1 where j is among i's k nearest: [M, F] -> two of [M, M]."""
    if len(features) <= num_neighbors:
        raise ConfigError(
            f"images: {len(features)} are too few for {num_neighbors} neighbours of each; use more"
        )
    unit = F.normalize(features.double(), dim=1)
    kernel = unit @ unit.T
    others = kernel.clone().fill_diagonal_(-torch.inf)
    near = torch.zeros_like(kernel).scatter_(1, others.topk(num_neighbors).indices, 1.0)
    return kernel, near


def cknna_code_matrix(representations: Sequence[Tensor], num_neighbors: int = 10) -> Tensor | None:
    """CKNNA of every pair as the authors' public code computes it, on L2-normalised rows.

    With K, L the inner products without their diagonals, both masked to pairs that are neighbours
    in a *and* in b, and the unbiased HSIC of Song et al. 2012 in place of centring:

        hsic(K, L) = [tr(K L) + sum(K) sum(L) / ((M - 1)(M - 2)) - 2 sum(K L) / (M - 2)]
                     / (M (M - 3))
        CKNNA = hsic(K, L) / (sqrt(hsic(K, K) hsic(L, L)) + 1e-6).

    Shapes: L times [M, F] -> [L, L] float64. None where it has no value: k < 2 or M < 4.
    Source: the function `cknna` of github.com/minyoungg/platonic-rep, by its formula.
    """
    count = len(representations[0])
    if num_neighbors < 2 or count < 4:
        return None
    kernels, masks = [], []
    for each in representations:
        kernel, near = _neighbors(each, num_neighbors)
        kernels.append(kernel)
        masks.append(near)

    def hsic(i: int, j: int, mask: Tensor) -> Tensor:
        a, b = mask * kernels[i], mask * kernels[j]  # the mask leaves the diagonal out
        product = a.sum(0) @ b.sum(1)  # the sum of all entries of a b
        joint = a.sum() * b.sum() / ((count - 1) * (count - 2))
        return ((a * b.T).sum() + joint - 2 * product / (count - 2)) / (count * (count - 3))

    size = len(kernels)
    own = torch.stack([hsic(i, i, masks[i]) for i in range(size)])
    cross = [[hsic(i, j, masks[i] * masks[j]) for j in range(size)] for i in range(size)]
    joint = torch.tensor(cross, dtype=torch.float64)
    return joint / ((own[:, None] * own[None, :]).sqrt() + 1e-6)


class PairCosine:
    """Mean cosine of pairs of tokens of one image: merged ones, and all for comparison.

    Source: LGM paper, similarity of merged pairs.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, cosine: Tensor, chosen: Tensor) -> None:
        """Take in a batch: cosine [B, N, N], chosen [B, N, N] or [N, N] bool; pairs i < j count."""
        pairs = chosen.expand_as(cosine).triu(1)
        self._sums[name] = self._sums.get(name, 0.0) + float(cosine[pairs].double().sum())
        self._counts[name] = self._counts.get(name, 0) + int(pairs.sum())

    def mean(self, name: str) -> float | None:
        """None where there was no such pair."""
        count = self._counts.get(name, 0)
        return self._sums[name] / count if count else None


@torch.inference_mode()
def measure_alignment(
    tokenizer: ImageTokenizer,
    folder: str | Path,
    lengths: Sequence[int],
    num_images: int | None = None,
    num_neighbors: int = 10,
) -> dict[str, Any]:
    """CKNNA between all pairs of lengths, and the cosine of merged pairs at each.

    Returns: lengths, num_images, num_neighbors, cknna [L][L], cknna_mean over pairs of different
    lengths (None for one length), cknna_code and cknna_code_mean likewise by the other definition
    (None where it has no value), definitions, cosine_all, cosine_in_block, cosine_merged
    {K: mean or None}.
    """
    device = next(tokenizer.parameters()).device
    control = tokenizer.merging
    within = in_block_pairs(control.num_base_tokens, control.num_blocks, device)
    latents: dict[int, list[Tensor]] = {k: [] for k in lengths}
    pairs = PairCosine()
    for batch in StoredImages(folder, tokenizer.image_size).batches(num_images):
        z = tokenizer.encode(to_unit_range(batch.to(device)))
        cosine = cosine_similarity(z)  # [B, N, N]
        pairs.add("all", cosine, torch.ones_like(within))
        pairs.add("in_block", cosine, within)
        for k in lengths:
            latents[k].append(control.full_length(z, k).flatten(1).cpu())
            labels = control.cluster_labels(z, k)
            if labels is not None:
                pairs.add(f"merged {k}", cosine, labels[:, :, None] == labels[:, None, :])
    joined = [torch.cat(latents[k]) for k in lengths]
    matrix, by_code = cknna_matrix(joined, num_neighbors), cknna_code_matrix(joined, num_neighbors)
    return {
        "length_control": control.name,
        "lengths": list(lengths),
        "num_images": sum(len(part) for part in latents[lengths[0]]),
        "num_neighbors": num_neighbors,
        "cknna": matrix.tolist(),
        "cknna_mean": _mean_between(matrix),
        "cknna_code": None if by_code is None else by_code.tolist(),
        "cknna_code_mean": None if by_code is None else _mean_between(by_code),
        "definitions": DEFINITIONS,
        "cosine_all": pairs.mean("all"),
        "cosine_in_block": pairs.mean("in_block"),
        "cosine_merged": {str(k): pairs.mean(f"merged {k}") for k in lengths},
    }


def _mean_between(matrix: Tensor) -> float | None:
    """Mean over pairs of different lengths; None for one length. Shapes: [L, L]."""
    between = [float(matrix[i, j]) for i, j in itertools.combinations(range(len(matrix)), 2)]
    return sum(between) / len(between) if between else None
