"""The release's merge dictionary as a tree: for each K it has a matrix [N, K] and sizes [K]."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.merging.nesting import tree_from_cuts
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.release_import.reading import read_dictionary


def read_tree(path: str | Path, own: MergeTree) -> tuple[MergeTree | None, str]:
    """The tree of a merge dictionary, or of a merge_tree.safetensors.

    Args:
        path: The file.
        own: The tokenizer's merge tree. Where every given cut is one of its own it is kept, for it
            knows more: heights, and the lengths between.

    Returns: the tree (None: keep the tokenizer's), and a remark for the user.

    Raises: CheckpointError if the file cannot be read, its cuts are not nested, cross the blocks or
    have another number of base tokens.
    """
    if str(path).endswith(".safetensors"):
        tree = MergeTree.load(path)
        if (tree.num_base_tokens, tree.num_blocks) != (own.num_base_tokens, own.num_blocks):
            raise CheckpointError(
                f"{path}: a merge tree of {tree.num_base_tokens} tokens in {tree.num_blocks} "
                f"blocks; the tokenizer has {own.num_base_tokens} in {own.num_blocks}"
            )
        return tree, f"merge tree: {path}"
    cuts = read_cuts(path)
    lengths = ", ".join(str(cut.num_tokens) for cut in cuts)
    if cuts[0].num_base_tokens != own.num_base_tokens:
        raise CheckpointError(
            f"{path}: cuts of {cuts[0].num_base_tokens} base tokens; the tokenizer has "
            f"{own.num_base_tokens}"
        )
    try:
        tree = tree_from_cuts(cuts, own.num_blocks)
        same = [torch.equal(own.assignment(k.num_tokens).labels, k.labels) for k in cuts]
    except ConfigError as error:
        raise CheckpointError(f"{path}: {'; '.join(error.problems)}") from error
    if all(same):
        return (
            None,
            f"merge tree: the tokenizer's own, which has every cut of {path} (K = {lengths})",
        )
    return tree, (
        f"merge tree: from the cuts K = {lengths} of {path}. Their heights are unknown: ascending "
        "ranks stand in, and lengths between the given ones are filled in, smallest parts first. "
        f"The tokenizer's own tree differs at {same.count(False)} of {len(same)} lengths"
    )


def read_cuts(path: str | Path) -> list[MergeAssignment]:
    """All cuts of a merge dictionary, by K.

    Keys are K, as numbers or text; a value is one or more tensors, in a tuple, list or dictionary:
    an averaging (or membership) matrix [N, K] or labels [N], and optionally the sizes [K].

    Raises: CheckpointError naming the K that makes no sense.
    """
    cuts: dict[int, MergeAssignment] = {}
    for key, value in read_dictionary(path).items():
        digits = re.fullmatch(r"\D*(\d+)\D*", str(key)) if isinstance(key, (int, str)) else None
        if digits is None:
            raise CheckpointError(f"{path}: key {key!r} is no token length K")
        num_tokens = int(digits.group(1))
        where = f"{path}: K = {num_tokens}"
        if num_tokens in cuts:
            raise CheckpointError(f"{where}: given twice")
        cuts[num_tokens] = _cut(num_tokens, list(_tensors(value)), where)
    if len({cut.num_base_tokens for cut in cuts.values()}) != 1:
        raise CheckpointError(f"{path}: it needs one or more cuts, all of the same base tokens")
    return [cuts[num_tokens] for num_tokens in sorted(cuts)]


def _tensors(value: object) -> Iterable[Tensor]:
    """All tensors of a value, however deep it is nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _cut(num_tokens: int, tensors: list[Tensor], where: str) -> MergeAssignment:
    """One cut, from whichever of its tensors says which token belongs where."""
    tensors = [tensor.squeeze(0) if tensor.ndim == 3 else tensor for tensor in tensors]
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors) or "none"
    matrices = [tensor for tensor in tensors if tensor.ndim == 2]
    vectors = [tensor for tensor in tensors if tensor.ndim == 1]
    if matrices:
        labels = _labels(matrices[0], num_tokens, where)
    elif vectors and not max(vectors, key=len).is_floating_point():
        labels = max(vectors, key=len)
        vectors = [tensor for tensor in vectors if tensor is not labels]
    else:
        raise CheckpointError(
            f"{where}: tensors of shapes {shapes}; needed: an averaging matrix [N, {num_tokens}]"
        )
    cut = MergeAssignment.from_labels(labels.to(torch.int64))
    if cut.num_tokens != num_tokens:
        raise CheckpointError(f"{where}: it has {cut.num_tokens} clusters that are not empty")
    counts = torch.unique(labels, return_counts=True)[1].double()  # in the file's order
    for sizes in vectors:
        if sizes.shape == counts.shape and not torch.equal(sizes.double(), counts):
            raise CheckpointError(f"{where}: its sizes are not those of its clusters")
    return cut


def _labels(matrix: Tensor, num_tokens: int, where: str) -> Tensor:
    """Cluster of each token, from a matrix with one entry per row. Shapes: [N, K] -> [N]."""
    if matrix.shape[1] != num_tokens:
        raise CheckpointError(
            f"{where}: a matrix of shape {list(matrix.shape)}, expected [N, {num_tokens}]"
        )
    member = matrix.double() > 0  # [N, K]
    if not torch.equal(member.sum(1), torch.ones(len(matrix), dtype=torch.int64)):
        raise CheckpointError(f"{where}: its matrix does not put each token into one cluster")
    # What it may be: P itself (columns sum to 1), or A (zeros and ones). Anything else is no cut.
    shares = member.double() / member.sum(0).clamp_min(1)
    averaging = torch.allclose(matrix.double(), shares, atol=1e-4)
    if not averaging and not torch.equal(matrix.double(), member.double()):
        raise CheckpointError(f"{where}: its matrix neither averages clusters nor lists members")
    return member.to(torch.int64).argmax(1)
