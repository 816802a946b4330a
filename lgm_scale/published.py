"""Files that other people publish and that this project reads: where, how large, under which terms.

One entry per file; whoever names a file in a message takes it from here. Free of torch, and nothing
is downloaded. (`lgm_scale.assets` lists, fetches and checks them.)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedFile:
    """One file of other people.

    Args:
        url: Where it is to be had.
        size: How large it is, about, for people.
        licence: Terms that its authors state.
        hash_prefix: First digits of the SHA-256 that its authors publish, in the file's own name;
            None where they publish none.
    """

    url: str
    size: str
    licence: str
    hash_prefix: str | None = None

    @property
    def name(self) -> str:
        """The name that its authors gave it."""
        return self.url.rsplit("/", 1)[1]


_META = "https://dl.fbaipublicfiles.com"
_VAE = "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main"

PUBLISHED = {
    "vgg16": PublishedFile(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "528 MB",
        "torchvision: BSD-3-Clause; trained on ImageNet, whose terms are for research",
        "397923af",
    ),
    "dino_critic": PublishedFile(
        f"{_META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
        "87 MB",
        "DINO: Apache-2.0",
    ),
    **{
        f"dinov2_{size}": PublishedFile(
            f"{_META}/dinov2/dinov2_vit{size}14/dinov2_vit{size}14_pretrain.pth",
            text,
            "DINOv2: Apache-2.0",
        )
        for size, text in {"s": "88 MB", "b": "346 MB", "l": "1.2 GB"}.items()
    },
    "inception": PublishedFile(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        "96 MB",
        "torch-fidelity: Apache-2.0",
        "6726825d",
    ),
    "reference": PublishedFile(
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
        "VIRTUAL_imagenet256_labeled.npz",
        "about 2 GB",
        "guided-diffusion: MIT; images of ImageNet, whose terms are for research",
    ),
    "sd_vae_config": PublishedFile(f"{_VAE}/config.json", "1 kB", "sd-vae-ft-mse: MIT"),
    "sd_vae_weights": PublishedFile(
        f"{_VAE}/diffusion_pytorch_model.safetensors", "335 MB", "sd-vae-ft-mse: MIT"
    ),
}
"""By the word that keys of configurations use."""
