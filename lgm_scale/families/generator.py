"""A family whose networks make images: what a bundle, a sweep and a pipeline ask of it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lgm_scale.config.loading import to_dict
from lgm_scale.config.schema import DeepSpeedConfig, EvaluationConfig
from lgm_scale.families.base import Family, families, imported

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lgm_scale.sampling.config import SamplerConfig


@dataclass(frozen=True)
class GeneratorFacts:
    """What a bundle says about its generator, before a network is built.

    Args:
        problems: Lines about parts of the bundle that do not belong together.
    """

    image_size: int
    num_classes: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """A generator that is evaluated while it is trained; its weights are still to come.

    Args:
        bundle: All it needs to make images, in the form that its pipeline takes.
        frozen: Name -> weights of networks that are not trained and that samples depend on.
        reconstruction: Name -> hash of the files that reconstructions depend on.
    """

    bundle: Any
    frozen: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    reconstruction: Mapping[str, str] = field(default_factory=dict)


class GeneratorFamily(Family):
    """A family whose networks make images of classes, at some token counts K.

    Its `schema` derives from `GeneratorRun`, and its objective from `FlowObjectiveConfig`.
    """

    sampler_defaults: ClassVar[dict[str, Any]] = {}
    """Fields of `SamplerConfig` whose defaults are others in this family."""
    pipeline_class: ClassVar[str]
    """ "module:class" of its pipeline."""
    about_tokens: ClassVar[str] = "One generator works at {lengths} tokens, with the same weights."
    """For the head of a report: what K is. {size} is N, {lengths} are those of the sweep."""
    about_noise: ClassVar[str] = "A column starts from one noise."
    """For pictures in a report whose rows are token counts: what one column is."""

    takes_mean_flow: ClassVar[bool] = False
    """Whether its networks can give the average velocity: `model.end_time`."""
    takes_contrast: ClassVar[bool] = False
    """Whether its loss is `flow.contrasted`."""

    def rules(self, run: Any) -> Iterator[str]:
        """Rules of the objective, which all generators share."""
        objective = run.objective
        yield from _mean_flow(run, self.takes_mean_flow)
        yield from _contrast(run, self.takes_contrast)
        if not 0 <= objective.label_dropout < 1:
            yield f"objective.label_dropout: {objective.label_dropout} must be in [0, 1)"
        if objective.timestep_std <= 0:
            yield f"objective.timestep_std: {objective.timestep_std} must be above 0"

    @override
    def forward_passes(self, run: Any) -> int:
        """Three, or with MeanFlow seven: two for its guidance, two for the derivative."""
        return 3 if run.objective.mean_flow is None else 7

    @override
    def least_batch(self, run: Any) -> int:
        return 2 if run.objective.contrastive else 1

    def num_classes(self, run: Any) -> int | None:
        """Classes of the model."""
        return run.model.num_classes

    def evaluation(self, run: Any) -> EvaluationConfig | None:
        """The section `evaluation` of the run."""
        return run.evaluation

    @abstractmethod
    def facts(self, info: dict[str, Any], folder: str) -> GeneratorFacts:
        """What bundle.json says. Raises: CheckpointError, KeyError, TypeError where damaged."""

    @abstractmethod
    def length_problems(
        self, info: dict[str, Any], folder: str, cells: Iterable[tuple[int, SamplerConfig]]
    ) -> Iterator[str]:
        """Lines about (K, settings) whose token counts the generator of a bundle does not have."""

    def described_models(self, run: Any) -> dict[str, Any]:
        """Entry `models` of the bundle.json that the run will leave. Raises: CheckpointError."""
        return {"generator": to_dict(run.model)}

    @abstractmethod
    def evaluated(
        self, run: Any, dataset: Any, info: dict[str, Any], device: torch.device
    ) -> Evaluated:
        """The generator of a run that is still training; `info` will be its bundle.json."""

    def pipeline(self) -> Any:
        """The class that makes images from its bundles: a `pipeline.Pipeline`."""
        return imported(self.pipeline_class)


def _mean_flow(run: Any, known: bool) -> Iterator[str]:
    """Rules of `objective.mean_flow`, and of the network that goes with it."""
    flow, end_time = run.objective.mean_flow, known and run.model.end_time
    if flow is None:
        if end_time:
            yield (
                "model.end_time: true, and nothing trains it; set objective.mean_flow, or "
                "model.end_time to false"
            )
        return
    if not known:
        yield f"objective.mean_flow: networks of task {run.task} have no end time; set it to null"
        return
    if not end_time:
        yield (
            "objective.mean_flow: needs a network that knows where a step ends; set model.end_time "
            "to true"
        )
    if not 0 < flow.share <= 1:
        yield f"objective.mean_flow.share: {flow.share} must be above 0 and at most 1"
    if not 1 <= flow.guidance < math.inf:
        yield f"objective.mean_flow.guidance: {flow.guidance} must be 1 (none) or more, and finite"
    if not 0 <= flow.adaptive <= 1:
        yield f"objective.mean_flow.adaptive: {flow.adaptive} must be in [0, 1]; 0 is off"
    if run.train.compile is True:
        yield (
            "train.compile: true is not for objective.mean_flow, for compiled blocks have no "
            "derivative along the flow; set it to false"
        )
    parallel = run.parallel
    if parallel.strategy == "deepspeed" and (parallel.deepspeed or DeepSpeedConfig()).stage == 3:
        yield (
            "parallel.deepspeed.stage: 3 gathers weights by hooks that have no derivative along "
            "the flow (objective.mean_flow); use stage: 2, or parallel.strategy: fsdp"
        )


def _contrast(run: Any, known: bool) -> Iterator[str]:
    """Rules of `objective.contrastive`."""
    weight = run.objective.contrastive
    if not 0 <= weight < 1:
        yield f"objective.contrastive: {weight} must be in [0, 1)"
    elif weight and not known:
        yield f"objective.contrastive: {weight} has no effect for task {run.task}; set it to 0"
    elif weight and run.objective.mean_flow is not None:
        yield (
            f"objective.contrastive: {weight} is for the velocity, and objective.mean_flow trains "
            "its average; set the one to 0, or the other to null"
        )


def solver_problems(
    info: dict[str, Any], configs: Iterable[SamplerConfig], key: str
) -> Iterator[str]:
    """The problem of solvers that ask another velocity of a bundle's network than it gives.

    `info` is its bundle.json, `key` says what asks for the solvers.
    """
    average = gives_average(info)
    for name in sorted({config.solver.value for config in configs}):
        if average and name != "mean_flow":
            yield (
                f"{key}: solver {name} knows no end of a step, and this generator was trained with "
                "objective.mean_flow; take solver mean_flow"
            )
        if name == "mean_flow" and not average:
            yield (
                f"{key}: solver mean_flow needs a generator that was trained with "
                "objective.mean_flow, and this one gives the velocity; take euler or heun"
            )


def gives_average(info: dict[str, Any]) -> bool:
    """Whether the network of a bundle gives the average velocity up to an end time."""
    return bool(info.get("models", {}).get("generator", {}).get("end_time"))


def generator_families() -> dict[str, GeneratorFamily]:
    """The families that make images, by task."""
    return {k: f for k, f in families().items() if isinstance(f, GeneratorFamily)}
