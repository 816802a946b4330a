"""A family whose networks make images: what a bundle, a sweep and a pipeline ask of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lgm_scale.config.loading import to_dict
from lgm_scale.config.schema import EvaluationConfig
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

    def rules(self, run: Any) -> Iterator[str]:
        """Rules of the objective, which all generators share."""
        objective = run.objective
        if not 0 <= objective.label_dropout < 1:
            yield f"objective.label_dropout: {objective.label_dropout} must be in [0, 1)"
        if objective.timestep_std <= 0:
            yield f"objective.timestep_std: {objective.timestep_std} must be above 0"

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


def generator_families() -> dict[str, GeneratorFamily]:
    """The families that make images, by task."""
    return {k: f for k, f in families().items() if isinstance(f, GeneratorFamily)}
