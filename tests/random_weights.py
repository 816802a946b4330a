"""Files of random weights for networks whose real weights are never downloaded."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn


def save_random_vgg16(path: Path) -> nn.Module:
    """Write VGG16's convolutions as torchvision names them; torchmetrics' LPIPS on the same."""
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    lpips = _LPIPS(pretrained=True, net="vgg", pnet_rand=True).eval()
    state = {
        "features." + name.split(".", 1)[1]: value for name, value in lpips.net.state_dict().items()
    }
    torch.save(state, path)
    return lpips


def save_random_inception(path: Path) -> None:
    """Write Inception weights, with batch norms that see their own activations.

    Without the latter, features are nearly the same for all images.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as module

    network = module.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with (
        patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}),
        patch.object(network, "load_state_dict", lambda *_, **__: None),
    ):
        net = network("inception-v3-compat", ["2048"])
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the plain mean: of one batch here
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        net.train()(images)
    torch.save(net.eval().state_dict(), path)
