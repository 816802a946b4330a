"""Configuration of a run that trains LGM's generator or an adapter of one. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lgm_scale.config.schema import STRICT, FlowObjectiveConfig, GeneratorRun, required
from lgm_scale.data.manifest import FEATURE_DIM, Manifest
from lgm_scale.errors import DataError
from lgm_scale.families.base import NOT_COMPILED
from lgm_scale.families.tokenizer.config import outside_choices


@dataclass(frozen=True)
class DiTSize:
    """Width, layers and heads; parameters in millions at D = 32, N = 256, 1000 classes."""

    width: int
    depth: int
    num_heads: int
    params_m: float


DIT_SIZES = {
    #            width depth heads params
    "tiny": DiTSize(128, 4, 4, 1.4),
    "s": DiTSize(512, 8, 8, 39.4),
    "b": DiTSize(768, 12, 12, 130.6),
    "l": DiTSize(1024, 24, 16, 458.2),
    "xl": DiTSize(1152, 28, 16, 675.3),
    "h": DiTSize(1280, 32, 16, 951.4),
}


@dataclass(frozen=True, kw_only=True)
class LGMModelConfig:
    """Arguments of `network.MergeDiT`."""

    __pydantic_config__ = STRICT
    removed: ClassVar[dict[str, str]] = {
        "routing": "nested routing did not pay (docs/faster.md); remove the key"
    }
    size: Literal["tiny", "s", "b", "l", "xl", "h"] = "b"
    """Width, layers and heads."""
    latent_dim: int = 32
    """D, the tokenizer's."""
    num_base_tokens: int = 256
    """N, the tokenizer's."""
    num_blocks: int = 4
    """Blocks within which tokens merge: the tokenizer's `num_codebooks`."""
    num_classes: int = 1000
    """Classes of the data."""
    end_time: bool = False
    """Give the average velocity up to a time that is passed besides; for objective.mean_flow."""


@dataclass(frozen=True, kw_only=True)
class FeatureAlignmentConfig:
    """Alignment with the tokenizer's features, which `encode_latents.py --features` has stored.

    Weight times one minus the cosine, through a linear layer that is in no bundle.
    """

    __pydantic_config__ = STRICT
    steps: int = required(50000)
    """Of so many first steps; the loss of all later ones is the plain one, to the bit."""
    block: int = required(8)
    """The features are those after so many blocks."""
    channels: int = 768
    """C of the features that lie beside the latents; 768 is the tokenizer's width at size B."""
    weight: float = 0.5
    """What one minus the cosine is multiplied by."""


@dataclass(frozen=True, kw_only=True)
class LGMObjectiveConfig(FlowObjectiveConfig):
    """The objective of generators on merged tokens: rectified flow, size-weighted (`flow.py`)."""

    __pydantic_config__ = STRICT
    noise_scale: Literal["corrected", "legacy"] = "corrected"
    """Noise merged like the data, or as in the published numbers unit noise per token."""
    feature_alignment: FeatureAlignmentConfig | None = None
    """null: the velocity alone is trained. For latents of `encode_latents.py --features`."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Train low-rank changes to a frozen generator, for one token length."""

    __pydantic_config__ = STRICT
    base: str
    """Generator bundle to start from; the result is a copy of it with one more adapter."""
    rank: int = 32
    """Of the changes."""
    alpha: float = 32.0
    """Changes are scaled by alpha / rank."""


@dataclass(frozen=True, kw_only=True)
class LGMRun(GeneratorRun):
    """Train a generator on latents, or with `lora` an adapter of one."""

    __pydantic_config__ = STRICT
    task: Literal["generator"]
    tokenizer: str
    """Bundle of the tokenizer that made the latents; its decoder goes into the final bundle."""
    model: LGMModelConfig
    objective: LGMObjectiveConfig = field(default_factory=LGMObjectiveConfig)
    lora: LoRAConfig | None = None


def _lora(config: LGMRun) -> Iterator[str]:
    if config.lora is None:
        return
    if config.init_from is not None:
        yield (
            f"init_from: {config.init_from}; an adapter starts from lora.base alone; remove "
            "init_from, or lora"
        )
    if config.objective.mean_flow is not None:
        yield (
            "objective.mean_flow: trains a whole generator; remove it, or train without lora with "
            "init_from, which goes on from a generator's weights"
        )
    if config.train.compile is True:
        yield NOT_COMPILED
    if config.evaluation is not None:
        yield (
            "evaluation: is for runs that train a whole generator, so far; leave it out with lora, "
            "and run eval/sweep.py on the result"
        )
    if config.logging.pictures is not None:
        yield (
            "logging.pictures: is for runs that train a whole generator, so far; set it to null "
            "with lora, and run python -m lgm_scale.sample on the result"
        )
    if len(set(config.lengths.choices)) > 1:
        lengths = ", ".join(map(str, sorted(set(config.lengths.choices))))
        yield f"lengths.choices: {lengths}; an adapter (lora) is for one token length, name one"
    for key, value in (("rank", config.lora.rank), ("alpha", config.lora.alpha)):
        if value <= 0:
            yield f"lora.{key}: {value} must be above 0"


def _per_sample(config: LGMRun) -> Iterator[str]:
    """What does not go with steps that hold all lengths."""
    lengths, train = config.lengths, config.train
    if not lengths.per_sample:
        return
    beside = "lengths.per_sample: true, with which every step holds all of lengths.choices"
    if lengths.weights is not None:
        yield (
            f"lengths.weights: {list(lengths.weights)} beside {beside}, in equal parts; set it to "
            "null, and name a length several times in lengths.choices to have more of it"
        )
    if lengths.longest_first:
        yield f"lengths.longest_first: {lengths.longest_first} beside {beside}; set it to 0"
    if train.batch_scaling == "constant_tokens":
        yield f"train.batch_scaling: constant_tokens beside {beside}; set it to constant_samples"
    if train.device_microbatch_tokens is not None:
        yield (
            f"train.device_microbatch_tokens: {train.device_microbatch_tokens} beside {beside}; "
            "set it to null, and train.device_microbatch_size to a number of samples"
        )
    if train.float8:
        yield f"train.float8: true was not tried beside {beside}; set one of them to false"
    if config.lora is not None:
        yield "lengths.per_sample: true, and an adapter (lora) is for one length; set it to false"
    if train.global_batch_size < len(lengths.choices):
        yield (
            f"train.global_batch_size: {train.global_batch_size} samples do not hold the "
            f"{len(lengths.choices)} lengths.choices of lengths.per_sample: true; make it "
            f"{len(lengths.choices)} or more"
        )


def _feature_alignment(config: LGMRun) -> Iterator[str]:
    """Rules of `objective.feature_alignment`."""
    asked, depth = config.objective.feature_alignment, DIT_SIZES[config.model.size].depth
    if asked is None:
        return
    key = "objective.feature_alignment"
    if not 1 <= asked.block <= depth:
        yield f"{key}.block: {asked.block} of {depth} blocks; name 1 to {depth}"
    for name in ("steps", "channels"):
        if getattr(asked, name) < 1:
            yield f"{key}.{name}: {getattr(asked, name)} must be 1 or more"
    if asked.weight <= 0:
        yield f"{key}.weight: {asked.weight} must be above 0; for none, set {key} to null"
    if config.objective.mean_flow is not None:
        yield (
            f"{key}: not yet beside objective.mean_flow; set one of them to null, or start "
            "MeanFlow from an aligned generator by init_from"
        )
    if config.lora is not None:
        yield f"{key}: trains a whole generator; remove it, or train without lora"


def lgm_rules(config: LGMRun) -> Iterator[str]:
    """Lines `key: value; rule; fix` for every rule that the configuration breaks."""
    lowest, highest = config.model.num_blocks, config.model.num_base_tokens
    yield from outside_choices(config.lengths.choices, lowest, highest)
    yield from _lora(config)
    yield from _per_sample(config)
    yield from _feature_alignment(config)
    if config.lora is not None and config.optimizer.mup_base is not None:
        yield "optimizer.mup_base: an adapter (lora) learns at one rate; set it to null"
    model: Any = config.model
    for name in ("latent_dim", "num_base_tokens", "num_blocks", "num_classes"):
        if getattr(model, name) < 1:
            yield f"model.{name}: {getattr(model, name)} must be 1 or more"
    if model.num_blocks >= 1 and model.num_base_tokens % model.num_blocks != 0:
        yield (
            f"model.num_base_tokens: {model.num_base_tokens} is not divisible by num_blocks "
            f"{model.num_blocks}"
        )


def check_latents(
    where: str, manifest: Manifest, num_base_tokens: int, latent_dim: int, tokenizer_id: str | None
) -> None:
    """Check a latent folder against the model and the tokenizer that will use it.

    Args:
        where: Its name, for messages.
        manifest: Its manifest.
        num_base_tokens: N of the model.
        latent_dim: D of the model.
        tokenizer_id: Hash of the tokenizer's weights; None leaves the check out.

    Raises: DataError if it has other shapes or another tokenizer.
    """
    found = (manifest.extra.get("num_base_tokens"), manifest.extra.get("latent_dim"))
    if found != (num_base_tokens, latent_dim):
        raise DataError(
            f"{where} holds latents of {found[0]} tokens x {found[1]} channels; the model wants "
            f"{num_base_tokens} x {latent_dim}. Set model.num_base_tokens and model.latent_dim to "
            "the tokenizer's, or encode with another tokenizer"
        )
    made_by = manifest.extra.get("tokenizer_id")
    if tokenizer_id is not None and made_by != tokenizer_id:
        raise DataError(
            f"{where} was encoded by tokenizer {str(made_by)[:12]}, but the configured one is "
            f"{tokenizer_id[:12]}: its statistics and merge tree belong to another tokenizer. "
            "Encode again with this tokenizer, or point `tokenizer` to the one that was used"
        )


def check_features(where: str, manifest: Manifest, channels: int) -> None:
    """Check that a latent folder has the features that `objective.feature_alignment` reads.

    Args:
        where: Its name, for messages.
        manifest: Its manifest.
        channels: C of the run.

    Raises: DataError if it has none, or of another width.
    """
    found, key = manifest.extra.get(FEATURE_DIM), "objective.feature_alignment"
    if found is None:
        raise DataError(
            f"{where} holds latents without features, which {key} needs; encode again with: "
            f"composer data_tools/encode_latents.py --tokenizer BUNDLE --images MDS --out FOLDER "
            f"--features, or set {key} to null"
        )
    if found != channels:
        raise DataError(
            f"{where} holds features of {found} channels; {key}.channels is {channels}. Set it to "
            f"{found}, or encode again with --features {channels}"
        )
