"""Typed, frozen run configurations: every key of a training run, and its default. Free of torch.

Precedence: defaults here, then the YAML file, then `key=value` overrides. How files become these
classes is in `lgm_scale.config.loading`; rules between keys, and those that need the number of
ranks or the machine, are in `lgm_scale.config.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from lgm_scale.data.config import DataConfig

__all__ = [
    "AssetsConfig",
    "DataConfig",
    "GeneratorRun",
    "InterfaceConfig",
    "SpaceConfig",
    "SpatialModelConfig",
    "SpatialRun",
    "TokenizerObjectiveConfig",
    "TokenizerRun",
    "TrainingRun",
]

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True)
class TokenizerModelConfig:
    """Arguments of `models.tokenizer.Tokenizer`."""

    __pydantic_config__ = _STRICT
    size: Literal["tiny", "s", "b", "l"] = "b"
    image_size: int = 256
    patch_size: int = 16
    num_base_tokens: int = 256
    latent_dim: int = 32
    num_codebooks: int = 4
    codebook_size: int = 8192
    latent_init: Literal["normal", "aligned"] = "normal"
    length_control: Literal["lgm", "fixed", "tome", "truncate", "none"] = "lgm"
    dropped_tokens: Literal["zero", "learned"] = "zero"
    """What the decoder reads in place of a token that `length_control: truncate` dropped."""
    pretrained_encoder: str | None = None
    """DINOv2 checkpoint of the encoder's size, from which training starts; `hub`: download it
    through timm; null: from scratch."""


@dataclass(frozen=True, kw_only=True)
class TokenizerObjectiveConfig:
    """Weights of the tokenizer's losses; 0 switches one off, and with it the files it needs."""

    __pydantic_config__ = _STRICT
    pixel: float = 1.0
    entropy: float = 0.01
    alignment: float = 0.25
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
    """Of the critic, and so is `consistency`; without an adversarial loss they have no effect."""
    consistency: float = 4.0
    exploration_noise: float = 0.1


@dataclass(frozen=True, kw_only=True)
class AssetsConfig:
    """Files of frozen networks; a loss of weight 0 needs none. They are never in a checkpoint."""

    __pydantic_config__ = _STRICT
    vgg16: str | None = None
    dino_critic: str | None = None
    """DINO ViT-S/16."""
    dinov2_teacher: str | None = None
    dinov2_size: Literal["s", "b", "l"] = "l"
    """Size of the teacher: ViT-S, ViT-B, ViT-L (published)."""
    allow_random_assets: bool = False
    """Missing files are replaced by random weights, for trials; the result says so."""


@dataclass(frozen=True, kw_only=True)
class GeneratorModelConfig:
    """Arguments of `models.dit.MergeDiT`."""

    __pydantic_config__ = _STRICT
    size: Literal["tiny", "s", "b", "l", "xl", "h"] = "b"
    latent_dim: int = 32
    num_base_tokens: int = 256
    num_blocks: int = 4
    num_classes: int = 1000


@dataclass(frozen=True, kw_only=True)
class SpatialFlowConfig:
    """The objective of generators on a grid: rectified flow, see `objectives.flow`."""

    __pydantic_config__ = _STRICT
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    label_dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class FlowConfig(SpatialFlowConfig):
    """The objective of generators on merged tokens; see `objectives.flow`."""

    __pydantic_config__ = _STRICT
    noise_scale: Literal["corrected", "legacy"] = "corrected"


@dataclass(frozen=True, kw_only=True)
class InterfaceConfig:
    """ELIT's latent interface; see `models.elit.ELIT`."""

    __pydantic_config__ = _STRICT
    split: Literal["released", "declared", "paper"]
    """Blocks before Read, in the core and after Write, by size: `models.elit.SPLITS`."""
    group_size: int = 4
    """Side of a window in tokens. Published: 4 at 256 px, 8 at 512 px, which is 16 windows."""
    drop_mode: Literal["skip_core", "remove"] = "skip_core"
    """Whether latents that the core does not see still reach Write, as released, or do not."""
    position_rows: int = 4096
    """Rows of the latents' position table: the released number, of which N are ever read."""


@dataclass(frozen=True, kw_only=True)
class SpatialModelConfig:
    """A generator on a grid: `models.elit.ELIT`, or without `interface` its host `SiT`."""

    __pydantic_config__ = _STRICT
    size: Literal["tiny", "s", "b", "l", "xl"] = "b"
    patch_size: int = 2
    num_classes: int = 1000
    interface: InterfaceConfig | None = None


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """What a generator on a grid generates."""

    __pydantic_config__ = _STRICT
    kind: Literal["sd_vae", "pixels"]
    """`sd_vae`: four channels at an eighth of the side, from data_tools/encode_latents.py
    --encoder sd-vae. `pixels`: the images themselves, from data_tools/images_to_mds.py."""
    image_size: int = 256
    vae: str | None = None
    """Folder of the autoencoder that decodes; for `sd_vae`. Its encoder made the latents."""
    flip: bool = False
    """Mirror half of the images; the published recipes do not."""

    @property
    def channels(self) -> int:
        """Of the state."""
        return 4 if self.kind == "sd_vae" else 3

    @property
    def downsampling(self) -> int:
        """Pixels per place of the state, along a side."""
        return 8 if self.kind == "sd_vae" else 1

    @property
    def side(self) -> int:
        """Of the state."""
        return self.image_size // self.downsampling


@dataclass(frozen=True, kw_only=True)
class LengthsConfig:
    """Token lengths of training: a cycle, or with weights a draw per step. Equal on all ranks."""

    __pydantic_config__ = _STRICT
    choices: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    per_sample: bool = False
    """One draw per image instead of one per step; for `length_control: truncate` alone."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. `warmup` counts steps; `schedule: cosine` decays to `min_lr` at the end."""

    __pydantic_config__ = _STRICT
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr: float = 0.0
    warmup: int = 0
    clip_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Exponential moving average of the weights, the ones that are used and shared."""

    __pydantic_config__ = _STRICT
    decay: float = 0.9999
    """Per step, whatever `interval` is."""
    interval: int = 1
    """Steps between updates; one update then weighs as much as that many."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Duration in Composer's time strings (`400ep`, `1500ba`); batches in samples."""

    __pydantic_config__ = _STRICT
    max_duration: str
    global_batch_size: int
    device_microbatch_size: int | None = None
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    compile: bool = False
    """Compile a generator's blocks, one graph per token length."""
    batch_scaling: Literal["constant_samples", "constant_tokens"] = "constant_samples"
    """Generator, `constant_tokens`: batch and micro-batch sizes are those of the longest length,
    and a step at K takes K_max / K times as many samples. The learning rate is not rescaled."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Resume state: written every `interval` (a time string), the last `keep` are kept."""

    __pydantic_config__ = _STRICT
    interval: str = "1ep"
    keep: int = 2
    folder: str | None = None
    """Where resume state goes; default `<out>/state`. May be object storage (`s3://...`)."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where a run reports. The console and `<out>/metrics.jsonl` always get every step."""

    __pydantic_config__ = _STRICT
    interval: int = 50
    """Steps between console lines; one host-device synchronisation each."""
    progress_bar: bool = True
    tensorboard: bool = False
    wandb_project: str | None = None
    peak_tflops: float | None = None
    """Of one device at the run's precision; then loggers get model FLOPs utilisation, too."""


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    """Fully sharded data parallelism; every transformer block is a unit of its own."""

    __pydantic_config__ = _STRICT
    removed: ClassVar[dict[str, str]] = {"version": "FSDP 2 is the only version; remove the key"}
    """Keys of older versions -> what to write instead."""
    shard: Literal["full", "grad_op", "hybrid"] = "full"
    """`full`: weights are gathered for each block's forward and backward. `grad_op`: they stay
    from forward to backward. `hybrid`: `full` inside groups of `group_size`, copies across."""
    group_size: int | None = None
    """Ranks that share one copy under `hybrid`; null: those of one node."""
    reduce: Literal["fp32", "compute"] = "fp32"
    """Gradients are averaged in float32, or in the dtype of `train.precision`."""
    cpu_offload: bool = False
    """Keep shards, gradients and optimizer on the host."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """ZeRO, by DeepSpeed."""

    __pydantic_config__ = _STRICT
    stage: Literal[1, 2, 3] = 2
    """What is sharded: 1 the optimizer, 2 gradients as well, 3 weights as well."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What the host keeps; `all` is the optimizer and, at stage 3, the weights."""
    bucket_mib: int = 200
    """Gradients that are reduced at once."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How state is spread over ranks. A strategy's section goes with that strategy alone."""

    __pydantic_config__ = _STRICT
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    fsdp: FSDPConfig | None = None
    """null: the defaults, with `strategy: fsdp`."""
    deepspeed: DeepSpeedConfig | None = None
    """null: the defaults, with `strategy: deepspeed`."""
    activation_checkpointing: float = 0.0
    """Share of the blocks, evenly spread, whose activations are computed again in the backward
    pass instead of being kept."""
    timeout_seconds: int = 300
    """How long a rank waits for the others before the run fails."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What every training run has. `out` receives everything the run writes."""

    __pydantic_config__ = _STRICT
    run_name: str
    out: str
    data: DataConfig
    lengths: LengthsConfig
    train: TrainConfig
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True, kw_only=True)
class TokenizerRun(_Run):
    """Train a tokenizer on images."""

    __pydantic_config__ = _STRICT
    task: Literal["tokenizer"]
    model: TokenizerModelConfig
    objective: TokenizerObjectiveConfig = field(default_factory=TokenizerObjectiveConfig)
    assets: AssetsConfig = field(default_factory=AssetsConfig)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Train low-rank changes to a frozen generator, for one token length."""

    __pydantic_config__ = _STRICT
    base: str
    """Generator bundle to start from; the result is a copy of it with one more adapter."""
    rank: int = 32
    alpha: float = 32.0


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluate the average of the weights while it is trained, with the sweep's own evaluator."""

    __pydantic_config__ = _STRICT
    sweep: str
    """YAML file with the keys of a sweep (`evaluation.sweep.config`); bundle and out are the
    run's."""
    interval: str
    """A time string, such as 5000ba or 1ep."""


@dataclass(frozen=True, kw_only=True)
class GeneratorRun(_Run):
    """Train a generator on latents, or with `lora` an adapter of one."""

    __pydantic_config__ = _STRICT
    task: Literal["generator"]
    tokenizer: str
    """Bundle of the tokenizer that made the latents; its decoder goes into the final bundle."""
    model: GeneratorModelConfig
    objective: FlowConfig = field(default_factory=FlowConfig)
    lora: LoRAConfig | None = None
    evaluation: EvaluationConfig | None = None


@dataclass(frozen=True, kw_only=True)
class SpatialRun(_Run):
    """Train a generator on a grid of latents or pixels: ELIT or SiT."""

    __pydantic_config__ = _STRICT
    task: Literal["spatial_generator"]
    model: SpatialModelConfig
    space: SpaceConfig
    objective: SpatialFlowConfig = field(default_factory=SpatialFlowConfig)
    evaluation: EvaluationConfig | None = None


TrainingRun = TokenizerRun | GeneratorRun | SpatialRun

TRAINING_TASKS: dict[str, type] = {
    "tokenizer": TokenizerRun,
    "generator": GeneratorRun,
    "spatial_generator": SpatialRun,
}
