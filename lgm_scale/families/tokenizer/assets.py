"""Files of frozen or pretrained networks that the user provides, and the networks made of them.

Nothing is downloaded unless a key asks for it. Which files a run needs, and what is said where one
is missing, is in `config`.
"""

from __future__ import annotations

from dataclasses import dataclass

import timm
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from lgm_scale.errors import MissingAssetError
from lgm_scale.families.tokenizer.config import TokenizerRun, missing, needed_assets
from lgm_scale.families.tokenizer.critic import CriticBackbone
from lgm_scale.frozen import Frozen, load_perceptual, load_pretrained, to_imagenet

TEACHER_WIDTHS = {"s": 384, "b": 768, "l": 1024}
"""Feature width of each DINOv2 size."""
_SIZE_NAMES = {"s": "small", "b": "base", "l": "large"}


def load_from_hub(vit: VisionTransformer, size: str) -> None:
    """Load timm's DINOv2 of this size from the model hub: a download, asked for by the key's value.

    Raises: MissingAssetError if the hub does not answer.
    """
    name = f"vit_{_SIZE_NAMES[size]}_patch14_dinov2.lvd142m"
    try:
        hub = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:  # whatever the hub's client meets
        raise MissingAssetError(
            f"model.pretrained_encoder: hub was asked for timm/{name} and did not give it "
            f"({error}); check the network, or give the path of the file instead"
        ) from error
    vit.load_state_dict(checkpoint_filter_fn(hub.state_dict(), vit))


@dataclass(frozen=True)
class FrozenNets:
    """The frozen networks that the losses look through; None where a loss is off."""

    perceptual: Frozen | None = None
    teacher: Frozen | None = None
    critic: Frozen | None = None
    random_assets: tuple[str, ...] = ()
    """Config keys of the assets that were missing and got random weights."""

    def all(self) -> list[Frozen]:
        """Those that there are."""
        nets = (self.perceptual, self.teacher, self.critic)
        return [net for net in nets if net is not None]


class Teacher(nn.Module):
    """Per-patch features of a vision transformer, after its last norm, prefix tokens dropped.

    Latents from which these can be predicted hold what an image shows, not its pixels alone, and
    are easier to generate.

    Shapes: images [B, 3, S, S] in [-1, 1] -> [B, P, F].
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, P, F] of images [B, 3, S, S]."""
        return self.vit.forward_features(to_imagenet(images))[:, self.vit.num_prefix_tokens :]


def build_frozen(config: TokenizerRun, read: bool = True) -> FrozenNets:
    """The frozen networks that the configuration asks for.

    Without `read` only the structure is built (to count).

    Raises: MissingAssetError, CheckpointError.
    """
    assets = {asset.key: asset for asset in needed_assets(config)}
    absent = [asset for asset in assets.values() if read and not asset.present]
    if absent and not config.assets.allow_random_assets:
        raise MissingAssetError("\n".join(["files are missing:", *missing(absent)]))

    def path_of(key: str) -> str | None:
        return assets[key].path if read and assets[key].present else None

    return FrozenNets(
        perceptual=load_perceptual(path_of("assets.vgg16")) if "assets.vgg16" in assets else None,
        teacher=_teacher(config, path_of("assets.dinov2_teacher"))
        if "assets.dinov2_teacher" in assets
        else None,
        critic=_critic(path_of("assets.dino_critic")) if "assets.dino_critic" in assets else None,
        random_assets=tuple(asset.key for asset in absent),
    )


def _teacher(config: TokenizerRun, path: str | None) -> Frozen:
    vit = timm.create_model(
        f"vit_{_SIZE_NAMES[config.assets.dinov2_size]}_patch14_dinov2",
        pretrained=False,
        img_size=config.model.image_size,
        patch_size=config.model.patch_size,
        num_classes=0,
    )
    return _vision(vit, path, Teacher)


def _critic(path: str | None) -> Frozen:
    vit = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    return _vision(vit, path, CriticBackbone)


def _vision(vit: nn.Module, path: str | None, wrap: type[Teacher] | type[CriticBackbone]) -> Frozen:
    assert isinstance(vit, VisionTransformer)
    if path is not None:
        load_pretrained(vit, path)
    return Frozen(wrap(vit))
