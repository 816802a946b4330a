"""Features of the tokenizer's encoder: a teacher that needs no pass in training.

They lie in the shards of the latents that were made of them, and their means over all images beside
the shards: of each token, since most of what features vary by is a constant of the token.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lgm_scale.errors import DataError
from lgm_scale.storage.files import follow_umask

FEATURES_NAME = "feature_means.safetensors"


def some_channels(
    width: int, channels: int, device: torch.device | str
) -> Callable[[Tensor], Tensor]:
    """Features, or an orthogonal projection of them to fewer channels that roughly keeps cosines.

    The projection is drawn once for all tokenizers of a width, with a fixed seed.

    Shapes: [B, N, width] -> [B, N, channels]. Source: ours, after Johnson and Lindenstrauss.
    """
    if channels == width:
        return lambda features: features
    draws = np.random.default_rng(0).standard_normal((width, channels))
    basis = torch.from_numpy(np.linalg.qr(draws)[0]).to(device, torch.float32)  # [width, channels]
    return lambda features: features @ basis


class FeatureSums:
    """Sums over images of the features of each token, in float64, which adds up float16 exactly."""

    def __init__(self, num_tokens: int, channels: int) -> None:
        self.count = 0
        self.sums = torch.zeros(num_tokens, channels, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in the features of B images. Shapes: [B, N, C]."""
        self.count += len(features)
        self.sums += features.double().sum(0).cpu()

    def facts(self) -> dict[str, Any]:
        """Count and sums as JSON values; as text of 10 bytes a number, for there are many."""
        return {"count": self.count, "sums": base64.b64encode(self.sums.numpy().tobytes()).decode()}

    def merge(self, facts: Mapping[str, Any]) -> None:
        """Take in the facts of other images."""
        self.count += facts["count"]
        more = np.frombuffer(base64.b64decode(facts["sums"])).reshape(self.sums.shape)
        self.sums += torch.from_numpy(more.copy())

    def means(self) -> Tensor:
        """Mean features of each token: [N, C] float32."""
        return (self.sums / self.count).float()


def save_means(means: Tensor, path: str | os.PathLike[str]) -> None:
    """Write mean features [N, C] as safetensors."""
    save_file({"mean": means}, str(path))
    follow_umask(Path(path))


def load_means(folders: Sequence[Path], counts: Sequence[int]) -> Tensor:
    """Mean features of an epoch that takes `counts` samples from each folder: [N, C] float32.

    Raises: DataError if a file is missing or damaged.
    """
    means = []
    for folder in folders:
        try:
            means.append(load_file(str(folder / FEATURES_NAME))["mean"])
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(
                f"{folder / FEATURES_NAME}: no readable mean features ({error})"
            ) from error
    if len(means) == 1:
        return means[0]
    weights = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    return torch.tensordot(weights, torch.stack(means).double(), 1).float()
