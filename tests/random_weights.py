"""Files of random weights for networks whose real weights are never downloaded."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn


def torchmetrics_lpips() -> nn.Module:
    """LPIPS of torchmetrics on random convolutions, the same ones each time."""
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    return _LPIPS(pretrained=True, net="vgg", pnet_rand=True).eval()


def save_random_vgg16(path: Path) -> None:
    """Write the convolutions of `torchmetrics_lpips`, named as torchvision names VGG16's."""
    convolutions = torchmetrics_lpips().net
    assert isinstance(convolutions, nn.Module)
    state = convolutions.state_dict()
    torch.save({"features." + name.split(".", 1)[1]: value for name, value in state.items()}, path)


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
