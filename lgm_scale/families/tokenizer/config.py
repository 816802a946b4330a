"""Configuration of a run that trains a tokenizer, and its rules. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lgm_scale.config.schema import STRICT, ReconstructionsConfig, TrainConfig, TrainingRun
from lgm_scale.families.base import NOT_COMPILED, UNSIZED
from lgm_scale.published import COMMAND, PUBLISHED, Asset, missing_lines

RECONSTRUCTION_FILES = ("tokenizer.safetensors", "merge_tree.safetensors")
"""Weights and merge tree, in the bundles of tokenizers and of what contains them."""


@dataclass(frozen=True)
class TokenizerSize:
    """Width, layers and heads of encoder and decoder; initial layer scale (None: no scale)."""

    width: int
    depth: int
    num_heads: int
    layer_scale: float | None


TOKENIZER_SIZES = {
    #                    width depth heads layer scale
    "tiny": TokenizerSize(96, 2, 3, None),
    # One head: `latent_init: aligned` tells more positions apart. After tiny, for weights alone do
    # not tell heads.
    "mini": TokenizerSize(96, 2, 1, None),
    "s": TokenizerSize(384, 12, 6, 1e-5),
    "b": TokenizerSize(768, 12, 12, 1e-5),
    "l": TokenizerSize(1024, 24, 16, 1e-5),
}

UNPUBLISHED = ("tiny", "mini")
"""Sizes of ours, for which there is no pretrained encoder."""

AUXILIARY_SIZE = TokenizerSize(192, 3, 3, 1e-5)
"""Size of the decoder that predicts the teacher's features."""

FROM_HUB = "hub"
"""Value of model.pretrained_encoder that asks for a download."""


@dataclass(frozen=True, kw_only=True)
class TokenizerModelConfig:
    """What `network.Tokenizer` is built from."""

    __pydantic_config__ = STRICT
    size: Literal["tiny", "mini", "s", "b", "l"] = "b"
    """Width, layers and heads of encoder and decoder."""
    image_size: int = 256
    """Pixels along a side."""
    patch_size: int = 16
    """Pixels along the side of what becomes one patch."""
    num_base_tokens: int = 256
    """N, tokens of an image that is not merged."""
    latent_dim: int = 32
    """D, channels of a token."""
    quantizer: Literal["soft", "none"] = "soft"
    """soft, as published: a token becomes a softmax-weighted mean of codes; or none (ours): it
    stays as it is. Soft quantization reads a token's direction alone and lets few numbers through;
    a network that is small, or trained for minutes, reconstructs sharply only without it."""
    num_codebooks: int = 4
    """Segments of the quantizer, and (without one, too) blocks within which tokens may merge."""
    codebook_size: int = 8192
    """Codes per segment. No effect with `quantizer: none`."""
    latent_init: Literal["normal", "aligned"] = "normal"
    """normal, as published; or aligned (ours): latents and patches start from one lattice of
    positions, and attention from copying along it, in encoder and decoder. A short run from scratch
    needs it; a pretrained encoder does not."""
    length_control: Literal["lgm", "fixed", "tome", "truncate", "none"] = "lgm"
    """How N tokens become K: along the learned tree, a random one, per image (ToMe), by keeping
    the first K, or not at all."""
    dropped_tokens: Literal["zero", "learned"] = "zero"
    """What the decoder reads in place of a token that `length_control: truncate` dropped."""
    pretrained_encoder: str | None = None
    """DINOv2 checkpoint of the encoder's size, from which training starts; `hub`: download it
    through timm; null: from scratch."""


@dataclass(frozen=True, kw_only=True)
class TokenizerObjectiveConfig:
    """Weights of the tokenizer's losses; 0 switches one off, and with it the files it needs."""

    __pydantic_config__ = STRICT
    pixel: float = 1.0
    """Mean squared error."""
    entropy: float = 0.01
    """Codes: certain per token, diverse over the batch. It is wanted negative. `model.quantizer:
    none` wants 0 here."""
    alignment: float = 0.25
    """Embeddings as similar as the latents that they stand for."""
    perceptual: float = 0.0
    """LPIPS on VGG16; needs `assets.vgg16`."""
    perceptual_warmup: int = 10_000
    """Steps over which its weight grows from 0."""
    representation: float = 0.0
    """Predict DINOv2's features from the latents; needs `assets.dinov2_teacher`."""
    adversarial: float = 0.0
    """Times the adaptive weight; needs `assets.dino_critic`."""
    adversarial_start: int = 20_000
    """First step of both players."""
    lecam: float = 0.001
    """A weight of the critic's loss, and so is `consistency`; both have no effect without an
    adversarial loss."""
    consistency: float = 4.0
    """A weight of the critic's loss: the same answer to an augmented image."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on similarities, of which a step's tree is made."""


@dataclass(frozen=True, kw_only=True)
class AssetsConfig:
    """Files of frozen networks; a loss of weight 0 needs none. They are never in a checkpoint.

    null: where `python -m lgm_scale.assets --fetch NAME` puts the file, in `assets/`.
    """

    __pydantic_config__ = STRICT
    vgg16: str | None = None
    """For LPIPS."""
    dino_critic: str | None = None
    """DINO ViT-S/16."""
    dinov2_teacher: str | None = None
    """DINOv2, of `dinov2_size`."""
    dinov2_size: Literal["s", "b", "l"] = "l"
    """Size of the teacher: ViT-S, ViT-B, ViT-L (published)."""
    allow_random_assets: bool = False
    """Missing files are replaced by random weights, for trials; the result says so."""


@dataclass(frozen=True, kw_only=True)
class TokenizerRun(TrainingRun):
    """Train a tokenizer on images."""

    __pydantic_config__ = STRICT
    task: Literal["tokenizer"]
    model: TokenizerModelConfig
    objective: TokenizerObjectiveConfig = field(default_factory=TokenizerObjectiveConfig)
    assets: AssetsConfig = field(default_factory=AssetsConfig)
    augment: Literal["crop", "flip", "none"] = "crop"
    """crop, as published: a random cut of the image made up to a quarter larger, and a random flip;
    flip: the middle at its own size and a random flip, for small images whose every pixel counts;
    none: the middle alone."""
    crop_on: Literal["auto", "device", "workers"] = "auto"
    """Where that cut is scaled, made and flipped, with equal bits: by the workers that decode, or
    on the device that trains, which spares them more than half of their time; auto: on the device
    if it is a GPU. May change between resumes."""
    evaluation: ReconstructionsConfig | None = None


def tokenizer_rules(config: TokenizerRun) -> Iterator[str]:
    """Lines `key: value; rule; fix` for every rule that the configuration breaks."""
    model = config.model
    special = {"truncate": 1, "none": model.num_base_tokens}
    lowest = special.get(model.length_control, model.num_codebooks)
    yield from outside_choices(config.lengths.choices, lowest, model.num_base_tokens)
    yield from _train(config.train)
    if config.init_from is not None and model.pretrained_encoder is not None:
        yield (
            f"model.pretrained_encoder: {model.pretrained_encoder}; the encoder starts from the "
            "bundle in init_from; set it to null, or remove init_from"
        )
    yield from _model(model)
    if config.crop_on == "device" and config.augment != "crop":
        yield (
            f"crop_on: device has no effect with augment: {config.augment}, which scales nothing "
            "for training; set it to auto"
        )
    if model.quantizer == "none" and config.objective.entropy > 0:
        yield (
            f"objective.entropy: {config.objective.entropy} reads codes, and model.quantizer: none "
            "has none; set it to 0"
        )
    clip_norm = config.optimizer.clip_norm
    two_groups = config.objective.adversarial > 0 and config.parallel.strategy == "deepspeed"
    if two_groups and clip_norm is not None:
        yield (
            f"optimizer.clip_norm: {clip_norm} is for each player's gradient on its own, and "
            "parallel.strategy: deepspeed knows the norm of all gradients alone; set it to null, "
            "or use fsdp or ddp"
        )
    if config.evaluation is not None and config.evaluation.num_images < 1:
        yield f"evaluation.num_images: {config.evaluation.num_images} must be 1 or more"
    for name, value in vars(config.objective).items():
        if value < 0:
            yield f"objective.{name}: {value} must be 0 or more"


def _train(train: TrainConfig) -> Iterator[str]:
    """Lines about keys that generators alone have a use for."""
    why = "is for generators; a tokenizer's step costs the same at every length"
    if train.attention != "auto":
        yield UNSIZED.format(train.attention)
    if train.batch_scaling == "constant_tokens":
        yield f"train.batch_scaling: constant_tokens {why}"
    if train.device_microbatch_tokens is not None:
        yield f"train.device_microbatch_tokens: {train.device_microbatch_tokens} {why}"
    if train.compile is True:
        yield NOT_COMPILED


def _model(model: TokenizerModelConfig) -> Iterator[str]:
    if model.dropped_tokens != "zero" and model.length_control != "truncate":
        yield (
            f"model.dropped_tokens: {model.dropped_tokens} has no effect with length_control: "
            f"{model.length_control}, which drops no tokens; remove it"
        )
    sizes = ("image_size", "patch_size", "num_base_tokens", "latent_dim", "num_codebooks")
    below = [key for key in (*sizes, "codebook_size") if getattr(model, key) < 1]
    if below:
        yield from (f"model.{key}: {getattr(model, key)} must be 1 or more" for key in below)
        return
    if model.image_size % model.patch_size != 0:
        yield (
            f"model.image_size: {model.image_size} is not divisible by patch_size "
            f"{model.patch_size}"
        )
    if model.num_base_tokens % model.num_codebooks != 0:
        yield (
            f"model.num_base_tokens: {model.num_base_tokens} is not divisible by num_codebooks "
            f"{model.num_codebooks}; tokens merge within equal segments only"
        )
    elif model.num_base_tokens <= model.num_codebooks:
        yield f"model.num_base_tokens: {model.num_base_tokens} leaves nothing to merge"
    if model.latent_init == "aligned" and round(model.num_base_tokens**0.5) ** 2 != (
        model.num_base_tokens
    ):
        yield (
            f"model.latent_init: aligned needs a square num_base_tokens, not "
            f"{model.num_base_tokens}; use normal"
        )
    if model.pretrained_encoder is not None and model.size in UNPUBLISHED:
        yield (
            f"model.pretrained_encoder: there is none of size {model.size}; use null, or size s, "
            "b or l"
        )


def outside_choices(choices: Sequence[int], lowest: int, highest: int) -> Iterator[str]:
    """The problem of `lengths.choices` that merging does not reach."""
    outside = [value for value in choices if not lowest <= value <= highest]
    if outside:
        yield (
            f"lengths.choices: {outside} outside [{lowest}, {highest}], the range from one token "
            "per block to no merging"
        )


def needed_assets(config: TokenizerRun) -> list[Asset]:
    """The files that this configuration needs, each at its key's path or else in `assets/`.

    Losses of weight 0 need none, and `hub` is no file.
    """
    objective, assets, model = config.objective, config.assets, config.model
    needed = [
        (objective.perceptual > 0, "assets.vgg16", assets.vgg16, "vgg16",
         "the perceptual loss (objective.perceptual)"),
        (objective.adversarial > 0, "assets.dino_critic", assets.dino_critic, "dino_critic",
         "the adversarial loss (objective.adversarial)"),
        (objective.representation > 0, "assets.dinov2_teacher", assets.dinov2_teacher,
         f"dinov2_{assets.dinov2_size}", "the representation loss (objective.representation)"),
        (model.pretrained_encoder not in (None, FROM_HUB) and model.size not in UNPUBLISHED,
         "model.pretrained_encoder", model.pretrained_encoder, f"dinov2_{model.size}",
         "the encoder's pretrained start (null: from scratch)"),
    ]  # fmt: skip
    return [
        Asset(key, path or PUBLISHED[published].path, published, unlocks)
        for is_needed, key, path, published, unlocks in needed
        if is_needed
    ]


def missing(absent: Sequence[Asset]) -> list[str]:
    """One line for each of these files, which are not there, and one about ways out."""
    return [
        *missing_lines(absent),
        f"assets: get the files (`{COMMAND} --fetch "
        f"{' '.join(asset.published for asset in absent)}`), set the keys above to where they are, "
        "switch the losses off (weight 0), or, for a trial without meaning, set "
        "assets.allow_random_assets: true",
    ]
