"""What a family of models is to the rest of the house, and how one is found. Free of torch.

A family is one object with two halves. What can be said without torch (the schema of its runs,
rules, token lengths, words) is said before the slow import, so that a wrong configuration is told
at once. What needs torch (networks, data, training, bundles) is imported inside the methods.
Nothing outside of `families/` names a family: everybody asks the object of the run's `task`.

Other packages add a family under the entry point `lgm_scale.families`, or with `register` in a
module that commands import through `--import MODULE`. docs/extending.md shows one.
"""

from __future__ import annotations

import argparse
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lgm_scale.config.schema import EvaluationConfig, ReconstructionsConfig, TrainingRun
from lgm_scale.errors import ConfigError
from lgm_scale.published import Asset, missing_lines

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lgm_scale.data.epochs import EpochDataset, StreamOptions
    from lgm_scale.data.manifest import Manifest
    from lgm_scale.training.model import Rehearsal, TrainingModel


@dataclass(frozen=True)
class Tool:
    """Something of a family that a command calls, and the options that the command has for it.

    Args:
        target: "module:attribute"; imported when it is called, since it brings torch.
        help: What it reads, in a few words.
        options: Options of its own: flag -> arguments of `add_argument`.
        needed: Options that must be given: flag -> what the message says of them.
        instead: For importers: flag of a bundle -> options that it stands for, needed ones too.
    """

    target: str
    help: str = ""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    needed: Mapping[str, str] = field(default_factory=dict)
    instead: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Companions:
    """Networks that only the training needs, beside the one that is its result.

    Args:
        trained: Those with parameters of their own to train, by what people call them.
        frozen: Those that losses look through and nobody trains.
    """

    trained: Mapping[str, nn.Module] = field(default_factory=dict)
    frozen: Sequence[nn.Module] = ()


class Family(ABC):
    """A family of models: how its runs are configured, built, trained and kept.

    A family has no state: there is one object of it, and every method takes the run.
    """

    task: ClassVar[str]
    """Value of the key `task` in its configurations, and the kind of its bundles."""
    title: ClassVar[str]
    """What people call it, for messages."""
    schema: ClassVar[type[TrainingRun]]
    """Frozen dataclass of its runs."""
    fixed_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of its objective that say what weights mean, and so cannot change within a run."""
    contains: ClassVar[tuple[str, ...]] = ()
    """Kinds of bundles that are part of its own."""
    reconstruction_files: ClassVar[tuple[str, ...]] = ()
    """Files of its bundles that reconstructions depend on, the weights first."""
    encoders: ClassVar[dict[str, Tool]] = {}
    """Encoders (`data.preparation.encoders.LatentEncoder`) that make its training data of images;
    the default of their options is None, so that one given with another encoder is noticed."""
    importers: ClassVar[dict[str, Tool]] = {}
    """Functions (`release_import.Importer`) that read checkpoints of other projects."""
    initial_weights: ClassVar[str] = "lgm_scale.initial_weights:InitialWeights"
    """ "module:class" of what its runs take from the bundle in `init_from`, and adapt."""

    # --- free of torch ------------------------------------------------------------------------

    def rules(self, run: Any) -> Iterator[str]:
        """Lines `key: value; rule; fix` for what this run breaks among the family's own keys."""
        yield from ()

    def num_classes(self, run: Any) -> int | None:
        """How many classes the data must have; None where classes do not matter."""
        return None

    def evaluation(self, run: Any) -> EvaluationConfig | None:
        """How samples of the run are evaluated while it trains; None: they are not."""
        return None

    def reconstructions(self, run: Any) -> ReconstructionsConfig | None:
        """How reconstructions of the run are measured while it trains; None: they are not.

        Where it says something, `network` gives a `protocols.ImageTokenizer`, which has a
        `merge_tree()` where its merging says `has_tree`.
        """
        return None

    def data_kind(self, run: Any) -> str | None:
        """Kind of the data that it trains on, of `data.manifest.COLUMNS`.

        None: nothing is said of them before they are opened.
        """
        return None

    def check_data(self, run: Any, where: str, manifest: Manifest) -> None:
        """See that a source of data fits the model; `where` is its name. Raises: DataError."""
        return

    def bundles(self, run: Any) -> dict[str, tuple[str, str]]:
        """Bundles that the run reads: key -> folder and kind."""
        return {}

    def assets(self, run: Any) -> Sequence[Asset]:
        """Files of other people that the run reads, whether they are there or not."""
        return ()

    def missing_files(self, run: Any) -> Iterator[str]:
        """Lines `key: value; rule; fix` about files of other people that are not there."""
        yield from missing_lines(self.assets(run))

    def mixes_lengths(self, run: Any) -> bool:
        """Whether one batch may hold samples at different token counts."""
        return False

    def spreads_lengths(self, run: Any) -> bool:
        """Whether every step holds all of `lengths.choices`, in equal parts (`spread_lengths`)."""
        return False

    def forward_passes(self, run: Any) -> int:
        """What a training step costs, in forward passes: 3, for a backward pass costs two."""
        return 3

    def least_batch(self, run: Any) -> int:
        """How many samples its losses need in a micro-batch."""
        return 1

    # --- with torch ---------------------------------------------------------------------------

    @abstractmethod
    def dataset(self, run: Any, batch_size: int, options: StreamOptions) -> EpochDataset:
        """The training set of one rank, checked against the model. Raises: DataError."""

    def libraries(self, run: Any) -> tuple[str, ...]:
        """Modules that `network` and `companions` import and that a plan must import before.

        They cannot be imported while torch's default device is the meta device.
        """
        return ()

    @abstractmethod
    def network(self, run: Any) -> nn.Module:
        """The network that is trained, with fresh weights; on the meta device, its shapes alone.

        It has `flops(num_tokens)`, and a generator `block_lengths(num_tokens)`.
        """

    def companions(self, run: Any) -> Companions:
        """What else the training holds; on the meta device, shapes alone."""
        return Companions()

    def rehearsal(self, run: Any, num_samples: int, num_tokens: int) -> Rehearsal | None:
        """A step without data, at K tokens, on the meta device; None: it cannot be simulated."""
        return None

    def sample_bytes(self, run: Any) -> int | None:
        """Bytes of a sample of the training data, without torch; None: the data alone tell."""
        return None

    @abstractmethod
    def training_model(self, run: Any, dataset: Any) -> TrainingModel:
        """The network in its Composer shell. Raises: MissingAssetError, CheckpointError."""

    @abstractmethod
    def export(
        self,
        run: Any,
        folder: Path,
        model: Any,
        dataset: Any,
        average: dict[str, Tensor],
        training: dict[str, Any],
    ) -> None:
        """Write the run's result as a bundle. Called on rank 0 alone.

        Of the model, under whatever strategy, only what is no weight may be read. `average` holds
        whole weights by their names in the network; `training` says how it came about, for
        bundle.json.
        """

    def reconstructor(self, folder: str | Path, device: torch.device | str) -> Any:
        """The image tokenizer of a bundle of this kind, frozen.

        Raises: ConfigError where the family has none; CheckpointError.
        """
        raise ConfigError(
            f"bundle: {folder} is a {self.task} bundle ({self.title}), which reconstructs nothing"
        )


NOT_COMPILED = "train.compile: true is for generators without lora, so far; set it to false"
"""The line that a family yields whose networks are not compiled."""
UNSIZED = (
    "train.attention: {} is for merged tokens, which have sizes, and this model attends to none; "
    "set it to auto"
)
"""The line of a family whose tokens have no sizes."""


# --- the registry ---------------------------------------------------------------------------------

_OWN = (
    "lgm_scale.families.tokenizer.family:TokenizerFamily",
    "lgm_scale.families.lgm.family:LGMFamily",
    "lgm_scale.families.elit.family:ELITFamily",
)
_registered: dict[str, Family] = {}


def imported(name: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@cache
def _installed() -> dict[str, Family]:
    """Our own families, then those of other packages' entry points."""
    found: dict[str, Family] = {}
    named = [entry.value for entry in entry_points(group="lgm_scale.families")]
    for name in (*_OWN, *named):
        family = imported(name)()
        if family.task in found:
            raise ConfigError(f"task: {family.task} is the name of two families; {name} is one")
        found[family.task] = family
    return found


def register(family: Family) -> None:
    """Add a family to this process. Raises: ConfigError if another one has its task."""
    known = families().get(family.task)
    if known is not None and type(known) is not type(family):
        raise ConfigError(f"task: {family.task} is the name of {type(known).__name__} already")
    _registered[family.task] = family


def families() -> dict[str, Family]:
    """Every family, by task."""
    return _installed() | _registered


def family_of(run: TrainingRun) -> Family:
    """The family of a run."""
    return families()[run.task]


def latent_encoders() -> dict[str, Tool]:
    """Every encoder of training data, by name."""
    return {name: tool for f in families().values() for name, tool in f.encoders.items()}


def release_importers() -> dict[str, Tool]:
    """Every importer of other projects' checkpoints, by name."""
    return {name: tool for f in families().values() for name, tool in f.importers.items()}


class _Import(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            importlib.import_module(values)
        except ImportError as error:
            parser.error(f"--import {values}: {error}; is its folder on PYTHONPATH?")


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """`--import MODULE`: a module that registers a family, imported before anything is read."""
    parser.add_argument(
        "--import", metavar="MODULE", action=_Import, dest="_", default=argparse.SUPPRESS,
        help="a Python module that registers a family of models (docs/extending.md)",
    )  # fmt: skip
