"""Files that other people publish and that this project reads: where, how large, under which terms.

Facts about each file are here, once; who needs one says so (`families.base.Family.assets`,
`evaluation.features.files`), and `python -m lgm_scale.assets` lists, fetches and checks them. Free
of torch, and nothing is downloaded here.

Addresses are those in the sources of torchvision, timm and torch-fidelity, and in the pages of the
files' authors. Sizes follow from the numbers of parameters, and sums are copied from where
`sum_from` says: none of these files was at hand when this was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = "assets"
"""Folder of other people's files, below the one where commands run."""
COMMAND = "python -m lgm_scale.assets"


@dataclass(frozen=True)
class PublishedFile:
    """One file of other people.

    Args:
        url: Where it is to be had.
        megabytes: How large it is, about.
        licence: Terms that its authors state.
        sha256: The sum, or its first digits, as published; None where none is.
        sum_from: Who publishes the sum.
        folder: Below `FOLDER`, for files that are read together.
    """

    url: str
    megabytes: float
    licence: str
    sha256: str | None = None
    sum_from: str = ""
    folder: str = ""

    @property
    def name(self) -> str:
        """The name that its authors gave it."""
        return self.url.rsplit("/", 1)[1]

    @property
    def path(self) -> str:
        """Where it lies, unless a configuration names another place."""
        return "/".join(part for part in (FOLDER, self.folder, self.name) if part)

    @property
    def size(self) -> str:
        """How large it is, for people."""
        return size_text(self.megabytes)

    @property
    def sum_text(self) -> str:
        """What is known of its SHA-256, for people."""
        if self.sha256 is None:
            return "not known: none is published"
        whole = "" if len(self.sha256) == 64 else "begins with "
        return f"{whole}{self.sha256} ({self.sum_from})"


def size_text(megabytes: float) -> str:
    """Megabytes as people write them."""
    if megabytes >= 1000:
        return f"{megabytes / 1000:.1f} GB"
    return f"{megabytes:.0f} MB" if megabytes >= 1 else f"{megabytes * 1000:.0f} kB"


@dataclass(frozen=True)
class Asset:
    """One file of others that a configuration reads.

    Args:
        key: Key of the configuration that names it.
        path: Where the configuration has it.
        published: Its name in `PUBLISHED`.
        unlocks: What cannot be had without it.
    """

    key: str
    path: str
    published: str
    unlocks: str

    @property
    def present(self) -> bool:
        """Whether the file is there."""
        return Path(self.path).is_file()

    @property
    def in_folder(self) -> bool:
        """Whether it is looked for where `--fetch` puts it."""
        return Path(self.path) == Path(PUBLISHED[self.published].path)

    @property
    def missing_line(self) -> str:
        """What to say where it is not there: key, value, use, and the command that gets it."""
        file = PUBLISHED[self.published]
        get = f"`{COMMAND} --fetch {self.published}` gets it (about {file.size}, from {file.url})"
        if not self.in_folder:
            get += f" as {file.path}; then set {self.key} to that"
        return f"{self.key}: {self.path} is not a file; needed for {self.unlocks}; {get}"


def missing_lines(assets: Iterable[Asset]) -> Iterator[str]:
    """A line for each of these files that is not there."""
    for asset in assets:
        if not asset.present:
            yield asset.missing_line


_META = "https://dl.fbaipublicfiles.com"
_VAE = "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main"
_IMAGENET = "ImageNet's (non-commercial research)"
_BY_REFINERS = "by finegrain-ai/refiners for this address; its authors publish none"

PUBLISHED = {
    "vgg16": PublishedFile(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        553,
        f"torchvision: BSD-3-Clause; weights may be under their data's terms, it says: {_IMAGENET}",
        "397923af",
        "torchvision, in its name",
    ),
    "dino_critic": PublishedFile(
        f"{_META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
        87,
        f"DINO's repository: Apache-2.0; terms of its training images: {_IMAGENET}",
    ),
    **{
        f"dinov2_{size}": PublishedFile(
            f"{_META}/dinov2/dinov2_vit{size}14/dinov2_vit{size}14_pretrain.pth",
            megabytes,
            "DINOv2, code and weights: Apache-2.0",
            sha256,
            _BY_REFINERS,
        )
        for size, megabytes, sha256 in (
            ("s", 88, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
            ("b", 346, "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
            ("l", 1218, "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
        )
    },
    "inception": PublishedFile(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        96,
        "converted by torch-fidelity from TensorFlow's: Apache-2.0",
        "6726825d",
        "torch-fidelity, in its name",
    ),
    "adm_imagenet256": PublishedFile(
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
        "VIRTUAL_imagenet256_labeled.npz",
        2000,
        "guided-diffusion's code: MIT; it says nothing of this file; terms of its 10,000 "
        f"images: {_IMAGENET}",
    ),
    "sd_vae_config": PublishedFile(
        f"{_VAE}/config.json", 0.001, "sd-vae-ft-mse's card: MIT", folder="sd-vae-ft-mse"
    ),
    "sd_vae_weights": PublishedFile(
        f"{_VAE}/diffusion_pytorch_model.safetensors",
        335,
        "sd-vae-ft-mse's card: MIT",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        "several projects for the hub's revision 31f26fdeee13",
        folder="sd-vae-ft-mse",
    ),
}
"""By the words that `--fetch` takes."""


def names_at(path: str) -> list[str]:
    """Names of the published files that belong at a path, or into it where it is a folder."""
    here = Path(path)
    places = {name: Path(file.path) for name, file in PUBLISHED.items()}
    return [n for n, place in places.items() if here in (place, place.parent) and path != FOLDER]
