"""Typed, frozen run configurations: every key that all training runs share. Free of torch.

Precedence: defaults here, then the YAML file, then `key=value` overrides. How files become these
classes is in `lgm_scale.config.loading`; rules between keys, and those that need the number of
ranks or the machine, are in `lgm_scale.config.rules`. What a family of models adds (its network,
its objective) is in the `config.py` of its folder.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lgm_scale.data.config import STRICT, DataConfig


def required(example: Any) -> Any:
    """A key without a default.

    Args:
        example: A value that would do. Messages show it, and where the key is missing or wrong the
            rules between keys are heard as if it had been given.
    """
    return dataclasses.field(metadata={"example": example})


@dataclass(frozen=True, kw_only=True)
class LengthsConfig:
    """Token lengths of training: a cycle, or with weights a draw per step. Equal on all ranks."""

    __pydantic_config__ = STRICT
    removed: ClassVar[dict[str, str]] = {"middle": "it was for model.routing; remove the key"}
    choices: tuple[int, ...] = required([64, 32])
    """K of the steps, in turn; with `weights` the values that are drawn."""
    weights: tuple[float, ...] | None = None
    """How often each of `choices` is drawn, relative to the others; null: in turn."""
    longest_first: int = 0
    """Steps at the largest of `choices` before the others have their turn (ours). Tokens that are
    merged before they mean anything become all alike, and a short run stays there. Dry runs
    predict times without it."""
    per_sample: bool = False
    """A K for each image instead of one per step. For `length_control: truncate` a draw; for a
    generator on merged tokens every step holds all of `choices`, in equal parts, on each rank."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. `warmup` counts steps; `schedule: cosine` decays to `min_lr` at the end."""

    __pydantic_config__ = STRICT
    lr: float = 2e-4
    """Learning rate, after the warmup."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    weight_decay: float = 0.0
    """Of matrices, decoupled from the gradient; vectors have none."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate goes on after the warmup."""
    min_lr: float = 0.0
    """Where `cosine` ends."""
    warmup: int = 0
    """Steps over which the learning rate grows from 0."""
    clip_norm: float | None = None
    """Largest norm of a step's gradient; null: any."""
    mup_base: str | None = None
    """Size of the generator (`model.size`) for which `lr` was found: linear layers whose input is f
    times as wide as there learn at lr / f, and start from nothing with the deviation of their
    weights there over sqrt(f), so that one rate serves all widths (muP, arXiv 2203.03466, for
    Adam). null: one rate for all layers, which start as the method has it."""


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Exponential moving average of the weights, the ones that are used and shared."""

    __pydantic_config__ = STRICT
    decay: float = 0.9999
    """Per step, whatever `interval` is."""
    interval: int = 1
    """Steps between updates; one update then weighs as much as that many."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Duration in Composer's time strings (`400ep`, `1500ba`); batches in samples."""

    __pydantic_config__ = STRICT
    max_duration: str = required("400ep")
    """When the run is done."""
    global_batch_size: int = required(256)
    """Samples per step, of all ranks together."""
    device_microbatch_size: int | None = None
    """Samples that a rank computes at once; null: all of its share of the batch."""
    device_microbatch_tokens: int | None = None
    """The same for a generator, as tokens: at K a rank computes this / K samples at once. Losses
    stay, up to rounding, and short lengths do not run in many small pieces."""
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    """Type of the networks' matrix products; weights are float32."""
    compile: Literal["auto", True, False] = "auto"
    """Compile a generator's blocks, one graph per token length. auto: on a GPU, where nothing
    speaks against it; a run that goes on stays what it was when it began."""
    attention: Literal["auto", "mask", "channel", "flex"] = "auto"
    """How the sizes of merged tokens reach attention: by a mask, by an extra channel, or by
    FlexAttention in compiled blocks; equal up to rounding. auto: channel on a GPU, else mask."""
    float8: bool = False
    """Round what a generator's attention and MLP layers multiply to 8-bit floats, by torchao: an
    approximation, for GPUs like H100, compiled, under ddp."""
    batch_scaling: Literal["constant_samples", "constant_tokens"] = "constant_samples"
    """Generator, `constant_tokens`: batch and micro-batch sizes are those of the longest length,
    and a step at K takes K_max / K times as many samples. The learning rate is not rescaled."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Resume state: written every `interval` (a time string), the last `keep` are kept."""

    __pydantic_config__ = STRICT
    interval: str = "1ep"
    """A time string, such as 500ba or 1ep."""
    keep: int = 2
    """How many states are kept."""
    folder: str | None = None
    """Where resume state goes; default `<out>/state`. May be object storage (`s3://...`)."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where a run reports. The console and `<out>/metrics.jsonl` always get every step."""

    __pydantic_config__ = STRICT
    interval: int = 50
    """Steps between console lines; one host-device synchronisation each."""
    progress_bar: bool = True
    """Show one on the console."""
    tensorboard: bool = False
    """Also write to `<out>/tensorboard`."""
    wandb_project: str | None = None
    """Also report to this project of Weights & Biases; needs the extra `wandb`."""
    peak_tflops: float | None = None
    """Peak of one device at the run's precision; then loggers get model FLOPs utilisation, too."""
    pictures: str | None = None
    """How often (a time string) the average makes pictures at four K, in `<out>/pictures` and for
    the loggers; null: never. One costs a gathering of the average and 32 images."""


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    """Fully sharded data parallelism; every transformer block is a unit of its own."""

    __pydantic_config__ = STRICT
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

    __pydantic_config__ = STRICT
    stage: Literal[1, 2, 3] = 2
    """What is sharded: 1 the optimizer, 2 gradients as well, 3 weights as well."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What the host keeps; `all` is the optimizer and, at stage 3, the weights."""
    bucket_mib: int = 200
    """Gradients that are reduced at once."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How state is spread over ranks. A strategy's section goes with that strategy alone."""

    __pydantic_config__ = STRICT
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """A copy on every rank (ddp), or shares of one, by torch or by DeepSpeed."""
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
class MeanFlowConfig:
    """MeanFlow: train the average velocity up to an end time, for samples in one to four steps."""

    __pydantic_config__ = STRICT
    share: float = 0.5
    """Share of samples that are trained up to a later time; the others train the velocity."""
    guidance: float = 2.0
    """Guidance w that goes into the weights; on merged tokens the mean over base tokens, divided by
    the sizes as `cfg_rescale: per_position` does. 1: none."""
    adaptive: float = 1.0
    """Power p of the weight 1 / (error + 0.001)^p of a sample: few with a steep derivative then
    cannot outweigh all others, as they do on pixels. 1 is published; 0: no weights."""


@dataclass(frozen=True, kw_only=True)
class FlowObjectiveConfig:
    """The objective of every generator: rectified flow, with times from a logit-normal law."""

    __pydantic_config__ = STRICT
    timestep_mean: float = 0.0
    """Of the normal whose sigmoid is t; above 0, more is trained near the data."""
    timestep_std: float = 1.0
    """Of the same normal."""
    label_dropout: float = 0.1
    """Share of samples that train the unconditional branch."""
    contrastive: float = 0.0
    """Weight of the squared distance to another sample's velocity, which is taken off the loss
    (contrastive flow matching, arXiv 2506.05350, which has 0.05); 0: none. The other sample is of
    the same micro-batch, whose size so changes what is computed; the number of ranks does not,
    where each has an even number of samples (beside `lengths.per_sample`, of every K) in a
    micro-batch, and as many micro-batches."""
    mean_flow: MeanFlowConfig | None = None
    """null: the velocity alone is trained. Goes with `model.end_time: true`."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluate the average of the weights while it is trained, with the sweep's own evaluator."""

    __pydantic_config__ = STRICT
    sweep: str = required("yamls/eval_sweep.yaml")
    """YAML file with the keys of a sweep (`evaluation.sweep.config`); bundle and out are the
    run's."""
    interval: str = required("5000ba")
    """A time string, such as 5000ba or 1ep."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionsConfig:
    """Measure reconstructions by the average of the weights while it is trained: PSNR at each K."""

    __pydantic_config__ = STRICT
    images: str = required("data/imagenet256/images/val")
    """MDS folder of images that are not trained on, of the model's size."""
    interval: str = required("5000ba")
    """A time string, such as 5000ba or 1ep."""
    num_images: int = 256
    """So many of them, evenly spaced; all of them if there are fewer."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What every training run has; a family of models adds `task`, `model` and its own sections."""

    __pydantic_config__ = STRICT
    task: str
    """Which family of models is trained."""
    run_name: str = required("my-run")
    """Its name in logs and messages."""
    out: str = required("runs/my-run")
    """Folder that receives everything the run writes."""
    data: DataConfig
    lengths: LengthsConfig
    train: TrainConfig
    seed: int = 0
    """Of initial weights, the order of data, and everything that is drawn."""
    init_from: str | None = None
    """Bundle whose weights a new run starts from: a local folder that a training or
    `lgm_scale.release_import` has written. Optimizer, step, schedule and average start new. Once
    the run has a state of its own, the bundle is not read again, and the key cannot change."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True, kw_only=True)
class GeneratorRun(TrainingRun):
    """What every run that trains a generator has besides; its `model` names `num_classes`."""

    __pydantic_config__ = STRICT
    evaluation: EvaluationConfig | None = None
