"""Features and classes of a small network that was trained on Fashion-MNIST: a judge in the box.

The weights are part of the package: nothing is given and nothing downloaded. The training is
`python -m experiments.fashion_classifier` in the repository; the file's metadata has the command,
the seed and the accuracy on the real validation images. Distances in its features are not FID.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import override

from lgm_scale.data.fashion_mnist import CLASSES
from lgm_scale.evaluation.engine.chunks import Arrays
from lgm_scale.evaluation.features.extraction import FeatureSpace, run_network
from lgm_scale.frozen import read_weights
from lgm_scale.storage.files import file_hash

WEIGHTS = Path(__file__).parent / "weights" / "fashion_mnist.safetensors"
WIDTH = 128


class FashionClassifier(nn.Module):
    """Four convolutions, the mean over all places, one linear layer; colour is averaged away.

    Shapes: uint8 or float [B, 3, 32, 32] in 0 to 255 -> features [B, 128], logits [B, 10] in the
    order of `lgm_scale.data.fashion_mnist.CLASSES`.
    Source: ours.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 24), (24, 48), (48, 96), (96, WIDTH)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.layers = nn.Sequential(*layers[:-1])  # the mean follows the last one, at 4 x 4
        self.classify = nn.Linear(WIDTH, len(CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of a batch."""
        gray = images.float().mean(1, keepdim=True) / 255
        features = self.layers(gray).mean((2, 3))  # [B, 128]
        return features, self.classify(features)


def weights_metadata(path: Path = WEIGHTS) -> dict[str, str]:
    """What the file of weights says of itself: command, seed, accuracy on real images."""
    with safe_open(path, "pt") as file:
        return file.metadata()


class FashionFeatures(FeatureSpace):
    """Features before the last layer, and logits, as a `FeatureSpace`.

    Args:
        device: Where to compute; always in float32.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.net = FashionClassifier()
        self.net.load_state_dict(read_weights(WEIGHTS))
        self.net.eval().requires_grad_(False).to(self.device)
        self.weights_hash = file_hash(WEIGHTS)

    @property
    @override
    def outputs(self) -> dict[str, int]:
        return {"fashion_pool": WIDTH, "fashion_logits": len(CLASSES)}

    @override
    def __call__(self, images: Tensor) -> Arrays:
        return run_network(self.net, images.to(self.device), self.outputs)

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "space": "fashion_mnist",
            "network": "Fashion-MNIST classifier of this package, mean over places, logits",
            "precision": "float32, no TF32",
            "weights_sha256": self.weights_hash,
        }
