"""The average of a run's weights, in a network of its own: a generator's, or a tokenizer's.

The training does not notice: no random number is drawn from a global state, and nothing is written
into the model that is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from composer.utils import dist
from torch import Tensor, nn
from typing_extensions import override

from lgm_scale.config.loading import to_dict
from lgm_scale.config.schema import ReconstructionsConfig, TrainingRun
from lgm_scale.data.epochs import EpochDataset
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError, LGMError
from lgm_scale.evaluation.images import StoredImages, spread
from lgm_scale.evaluation.reconstructions.images import decode_at, encode
from lgm_scale.evaluation.sweep.rules import wrong_image_size
from lgm_scale.families.base import family_of
from lgm_scale.families.generator import generator_families
from lgm_scale.merging.tree import MergeTree
from lgm_scale.pipeline import Pipeline
from lgm_scale.pixels import finite_images, to_uint8
from lgm_scale.training.ema import EMA

NUM_ROWS, NUM_COLUMNS = 4, 8
"""Token counts and images of a picture."""


def own_randomness() -> AbstractContextManager[None]:
    """Leave torch's global generators as they were, those of this rank's device too."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)


def training_lengths(run: TrainingRun) -> list[int]:
    """Every K that a run trains at, ascending."""
    return sorted(set(run.lengths.choices))


def shown_lengths(lengths: Sequence[int]) -> list[int]:
    """Four of these K at most, the smallest and the largest among them, evenly spaced in rank."""
    rows = min(NUM_ROWS, len(lengths))
    return [lengths[round(i * (len(lengths) - 1) / max(1, rows - 1))] for i in range(rows)]


class Subject(ABC):
    """A network that the average is put into, and the pictures that it makes.

    Args:
        ema: Its whole average is gathered whenever it is looked at.
        run: The run.
    """

    title: ClassVar[str]
    """What its pictures show, for names of files and loggers."""
    net: nn.Module
    columns: list[str]
    """What stands over each column of a picture."""

    def __init__(self, run: TrainingRun, ema: EMA) -> None:
        self.run, self.ema = run, ema
        self.lengths = training_lengths(run)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", dist.get_local_rank())

    @contextmanager
    def average(self) -> Iterator[dict[str, Tensor]]:
        """Have the average in `net`, on this rank's device. Every rank must enter."""
        with own_randomness():
            average, state = self.ema.full_weights(), self.net.state_dict()
            assert average.keys() <= state.keys(), "the average belongs to another network"
            self.net.load_state_dict(state | average)
            try:
                self.net.to(self.device)
                yield average
            finally:
                self.net.to("cpu")  # the training has the memory again

    def check(self, lengths: Sequence[int]) -> None:
        """See that it can make pictures at these K. Raises: ConfigError, CheckpointError."""
        return

    def originals(self) -> dict[str, np.ndarray]:
        """Rows above those of the K, by name: images uint8 [C, 3, S, S]."""
        return {}

    @abstractmethod
    def row(self, num_tokens: int) -> np.ndarray:
        """Images at K tokens, inside of `average`. Shapes: uint8 [C, 3, S, S], C columns.

        Raises: LGMError where they are not finite.
        """


class GeneratorSubject(Subject):
    """A generator: its pictures are samples with fixed noise, of fixed classes.

    Args:
        dataset: The training set; gives the classes.

    Raises: CheckpointError, DataError for what cannot work; ConfigError for a K.
    """

    title = "samples"

    def __init__(self, run: TrainingRun, dataset: EpochDataset, ema: EMA) -> None:
        super().__init__(run, ema)
        family = generator_families()[run.task]
        self.info: dict[str, Any] = {
            "kind": run.task,
            "models": family.described_models(run),
            "classes": list(dataset.manifest.classes),
            "training": {"config": to_dict(run)},
        }
        with own_randomness():
            self.evaluated = family.evaluated(run, dataset, self.info, self.device)
        self.net, self._pipeline = self.evaluated.bundle.net, family.pipeline()
        self.classes = spread(len(dataset.manifest.classes), NUM_COLUMNS)
        self.columns = [dataset.manifest.classes[label] for label in self.classes]

    def pipeline(self, dtype: torch.dtype = torch.float32) -> Pipeline[Any]:
        """What samples, on the device where the network is now."""
        return self._pipeline(self.evaluated.bundle, dtype, "(this run)")

    @override
    def check(self, lengths: Sequence[int]) -> None:
        pipe = self.pipeline()
        for num_tokens in lengths:
            pipe.config(num_tokens)

    @override
    def row(self, num_tokens: int) -> np.ndarray:
        pipe = self.pipeline()
        images = pipe(self.classes, num_tokens, seed=self.run.seed, progress_bar=False)
        return np.asarray(images).transpose(0, 3, 1, 2)


class TokenizerSubject(Subject):
    """A tokenizer and the validation images: its pictures are their reconstructions.

    Args:
        images: The section `evaluation` of the run.

    Raises: DataError, ConfigError for images that are not there or of another size.
    """

    title = "reconstructions"

    def __init__(self, run: TrainingRun, config: ReconstructionsConfig, ema: EMA) -> None:
        super().__init__(run, ema)
        with own_randomness():
            self.net: Any = family_of(run).network(run).eval().requires_grad_(False)
        manifest = read_manifest(config.images, "images")
        problems = list(wrong_image_size(config.images, manifest, self.net.image_size))
        if problems:
            raise ConfigError([f"evaluation.{line}" for line in problems])
        self.images = StoredImages(config.images, self.net.image_size)
        indices = spread(len(self.images), NUM_COLUMNS)
        self._shown, labels = self.images.read(indices)
        self.columns = [manifest.classes[label] for label in labels]

    @override
    def originals(self) -> dict[str, np.ndarray]:
        return {"original": self._shown.numpy()}

    @override
    def row(self, num_tokens: int) -> np.ndarray:
        return self.reconstructed(self._shown, self.tree(), [num_tokens])[0].cpu().numpy()

    def tree(self) -> MergeTree | None:
        """The merge tree of the average, where the length control has one."""
        return self.net.merge_tree() if self.net.merging.has_tree else None

    def reconstructed(
        self, images: Tensor, tree: MergeTree | None, lengths: Sequence[int]
    ) -> list[Tensor]:
        """Images at each K, as `evaluation.commands.reconstruct` makes them.

        Shapes: uint8 [B, 3, S, S] -> uint8 [B, 3, S, S] each, on this rank's device.

        Raises: LGMError where one is not finite.
        """
        z = encode(self.net, images)
        made = [decode_at(self.net, tree, z, k, len(images)) for k in lengths]
        if not all(finite_images(pixels).all() for pixels in made):
            raise LGMError("reconstructions by the average of the weights are not finite")
        return [to_uint8(pixels) for pixels in made]
