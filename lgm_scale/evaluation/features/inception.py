"""Features of the Inception network that FID, IS and sFID are defined by.

torch-fidelity has the network, which resizes and normalises as the original TensorFlow graph does;
its weights are a file of the user's. Nothing is downloaded. sFID's spatial features are an extra
layer of ours, under a name of its own in torch-fidelity's registry.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lgm_scale.errors import CheckpointError, MissingAssetError
from lgm_scale.evaluation.engine.chunks import Arrays
from lgm_scale.evaluation.features.extraction import (
    FeatureSpace,
    run_network,
)
from lgm_scale.frozen import read_weights
from lgm_scale.storage.files import file_hash

__all__ = ["NETWORK", "SPATIAL_DIM", "InceptionFeatures"]

NETWORK = "inception-v3-adm"
SPATIAL = "spatial_adm"
SPATIAL_CHANNELS = 7
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17
LAYERS = ("2048", "logits_unbiased", SPATIAL)


@cache
def register_network() -> None:
    """Put the network with sFID's layer into torch-fidelity's registry.

    Raises: MissingAssetError if torch-fidelity cannot be imported.
    """
    try:
        from torch_fidelity import register_feature_extractor
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingAssetError(
            f"torch-fidelity cannot be imported ({error}); install it with "
            "`pip install torch-fidelity==0.4.0`, or leave the Inception weights out"
        ) from error

    class InceptionWithSpatial(FeatureExtractorInceptionV3):
        """Inception with one more feature: 7 channels of a middle layer, for sFID.

        Source: ADM's evaluator takes the first 7 channels of `mixed_6/conv`, rows first: the
        flattened order is (y, x, channel). Statistics in files are in that order.
        """

        def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
            self._plain = [layer for layer in features_list if layer != SPATIAL] or ["2048"]
            super().__init__(name, features_list, **kwargs)
            self.features_list = self._plain
            self.wanted = list(features_list)
            self._seen: Tensor | None = None
            self.Mixed_6d.branch1x1.register_forward_hook(self._keep)

        def _keep(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            self._seen = output

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            found = dict(zip(self._plain, super().forward(x), strict=True))
            if SPATIAL in self.wanted:
                assert self._seen is not None
                middle = self._seen[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)  # [B, 17, 17, 7]
                found[SPATIAL], self._seen = middle.flatten(1).float(), None
            return tuple(found[layer] for layer in self.wanted)

        def convert_features_tuple_to_dict(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
            return dict(zip(self.wanted, features, strict=True))

        @staticmethod
        def get_provided_features_list() -> Any:
            return (*FeatureExtractorInceptionV3.get_provided_features_list(), SPATIAL)

    register_feature_extractor(NETWORK, InceptionWithSpatial)


class InceptionFeatures(FeatureSpace):
    """Pool features, logits and spatial features, as a `FeatureSpace`.

    Args:
        path: Weights in torch-fidelity's form (`weights-inception-2015-12-05-6726825d.pth`).
        device: Where to compute; always in float32.

    Raises: CheckpointError if the file is none of these weights.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        # torch-fidelity unpickles whatever the file holds: refuse what is more than tensors first.
        read_weights(path)
        self.weights_hash = file_hash(path)
        self.device = torch.device(device)
        register_network()
        from torch_fidelity.utils import create_feature_extractor

        try:
            net = create_feature_extractor(
                NETWORK,
                list(LAYERS),
                cuda=False,
                verbose=False,
                feature_extractor_weights_path=str(path),
            )
        except (RuntimeError, TypeError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} does not fit inception-v3-compat: {reason}") from error
        self.net = net.to(self.device)

    @property
    @override
    def outputs(self) -> dict[str, int]:
        return {"inception_pool": 2048, "inception_logits": 1008, "inception_spatial": SPATIAL_DIM}

    @override
    def __call__(self, images: Tensor) -> Arrays:
        return run_network(self.net, images.to(self.device), self.outputs)

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "space": "inception",
            "network": "torch-fidelity inception-v3-compat; pool 2048, logits without bias, "
            "7 channels of mixed_6 (y, x, channel)",
            "precision": "float32, no TF32",
            "weights_sha256": self.weights_hash,
        }
