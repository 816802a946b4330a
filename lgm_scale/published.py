"""Addresses of the files of others that several rooms speak of. Nothing is downloaded here."""

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_HASH = "6726825d"
"""First digits of the SHA-256 of the published file: its own name says them."""
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
