"""Pool features of the Inception network that FID is defined by.

torch-fidelity has the network, which resizes and normalises as the original TensorFlow graph does;
its weights are a file of the user's. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from lgm_scale.bundle import file_hash
from lgm_scale.errors import CheckpointError, MissingAssetError
from lgm_scale.models.assets import read_weights

__all__ = ["WEIGHTS_URL", "InceptionFeatures"]

WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
NETWORK = "inception-v3-compat"
LAYER = "2048"


class InceptionFeatures:
    """Inception features, as a `FeatureExtractor`.

    Args:
        path: Weights in torch-fidelity's form (`weights-inception-2015-12-05-6726825d.pth`).
        device: Where to compute; always in float32.
        batch_size: Images at once. On a GPU the last bits may depend on it.

    Raises: CheckpointError if the file is none of these weights.
    """

    key = "inception_frechet"
    label = f"Frechet distance in {LAYER} Inception pool features"
    num_features = int(LAYER)

    def __init__(
        self, path: str | Path, device: torch.device | str = "cpu", batch_size: int = 64
    ) -> None:
        # torch-fidelity unpickles whatever the file holds: refuse what is more than tensors first.
        read_weights(path)
        self.weights_hash = file_hash(path)
        self.device, self.batch_size = device, batch_size
        try:
            from torch_fidelity.utils import create_feature_extractor
        except ImportError as error:
            raise MissingAssetError(
                f"torch-fidelity cannot be imported ({error}); install it with "
                "`pip install torch-fidelity==0.4.0`, or leave the Inception weights out"
            ) from error
        try:
            net = create_feature_extractor(
                NETWORK,
                [LAYER],
                cuda=False,
                verbose=False,
                feature_extractor_weights_path=str(path),
            )
        except (RuntimeError, TypeError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} does not fit {NETWORK}: {reason}") from error
        self.net = net.to(device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features, float32 numbers as float64. Shapes: uint8 [B, 3, S, S] -> [B, 2048]."""
        parts = [np.empty((0, self.num_features))]
        # Whatever the caller has set: neither shortened products nor sums chosen at run time.
        with torch.backends.cudnn.flags(benchmark=False, allow_tf32=False):
            for start in range(0, len(images), self.batch_size):
                batch = torch.from_numpy(images[start : start + self.batch_size]).to(self.device)
                with torch.autocast(batch.device.type, enabled=False):
                    (features,) = self.net(batch)
                parts.append(features.double().cpu().numpy())
        return np.concatenate(parts)

    def describe(self) -> dict[str, Any]:
        """For the protocol of a result."""
        return {
            "key": self.key,
            "label": self.label,
            "network": f"torch-fidelity {NETWORK}, layer {LAYER}",
            "precision": "float32, no TF32",
            "weights_sha256": self.weights_hash,
        }
