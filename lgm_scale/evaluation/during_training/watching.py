"""What looks at the average every so often: PSNR of reconstructions, pictures; and their shelf.

Lines of numbers go to `<run>/evaluation.jsonl`, pictures to `<run>/pictures`, both to the loggers.
A look costs one gathering of the average and the images that it makes; training goes on with the
same bits as without.
"""

from __future__ import annotations

import io
import json
import logging
import math
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from PIL import Image
from tqdm.contrib.logging import logging_redirect_tqdm
from typing_extensions import override

from lgm_scale.errors import LGMError
from lgm_scale.evaluation.during_training.subjects import (
    Subject,
    TokenizerSubject,
    shown_lengths,
)
from lgm_scale.evaluation.images import spread
from lgm_scale.evaluation.report.drawing import LIGHT, to_png
from lgm_scale.evaluation.report.pictures import image_grid
from lgm_scale.parallel.collectives import raise_everywhere
from lgm_scale.pixels import psnr
from lgm_scale.storage.files import write_whole

log = logging.getLogger("lgm_scale")

BATCH_SIZE = 16


class Watch(Callback):
    """Looks whenever an interval of steps or epochs is over, after the average has moved.

    Args:
        interval: A time string, such as 5000ba or 1ep.
    """

    def __init__(self, interval: str) -> None:
        self.interval = Time.from_timestring(interval)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look if an interval of steps is over."""
        if self.interval.unit is TimeUnit.BATCH:
            self._look_at(state.timestamp.batch.value, state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Look if an interval of epochs is over."""
        if self.interval.unit is TimeUnit.EPOCH:
            self._look_at(state.timestamp.epoch.value, state, logger)

    def _look_at(self, now: int, state: State, logger: Logger) -> None:
        if now % self.interval.value == 0:
            self.look(state.timestamp.batch.value, logger)

    @abstractmethod
    def look(self, step: int, logger: Logger | None = None) -> object:
        """Look at the average after this many steps. Every rank must call it."""


class Reconstructions(Watch):
    """PSNR of the reconstructed validation images at every K of the training.

    The images are dealt to ranks, and the numbers are those of
    `evaluation.commands.reconstruct` on a bundle of the same weights and images.

    Args:
        num_images: So many of the images, evenly spaced; all of them if there are fewer.
    """

    def __init__(self, interval: str, subject: TokenizerSubject, num_images: int) -> None:
        super().__init__(interval)
        self.subject = subject
        self.indices = spread(len(subject.images), num_images)

    @override
    def look(self, step: int, logger: Logger | None = None) -> list[dict[str, Any]]:
        """Rows of the average as it is now. Every rank must call it."""
        starts = range(0, len(self.indices), BATCH_SIZE)
        found = _shared(self.subject, lambda: self._measured(starts))
        lengths, rows = self.subject.lengths, []
        for i, num_tokens in enumerate(lengths):
            db = [value for start in starts for value in found[start][i]]
            rows.append(
                {
                    "label": f"K={num_tokens}",
                    "num_images": len(db),
                    "metrics": {"psnr_db": math.fsum(db) / len(db)},
                    "names": {"psnr_db": "PSNR in dB"},
                }
            )
        at = "  ".join(
            f"{k}: {row['metrics']['psnr_db']:.2f}" for k, row in zip(lengths, rows, strict=True)
        )
        line = f"PSNR in dB of {len(self.indices)} reconstructions at K={at}"
        record(Path(self.subject.run.out), step, rows, [line], logger)
        return rows

    def _measured(self, starts: range) -> dict[int, list[list[float]]]:
        """This rank's batches: PSNR of each image, by K, by the first image of the batch."""
        subject, measured = self.subject, {}
        tree = subject.tree()
        for start in starts[dist.get_global_rank() :: dist.get_world_size()]:
            images, _ = subject.images.read(self.indices[start : start + BATCH_SIZE])
            made = subject.reconstructed(images, tree, subject.lengths)
            measured[start] = [psnr(images.to(x.device), x).tolist() for x in made]
        return measured


class Pictures(Watch):
    """A picture of the average: a row per K, four K at most, and columns that stay the same.

    Rows are dealt to ranks; rank 0 draws. Of a generator a column is one class and one noise, with
    the sampler settings of a call that names none.

    Raises: ConfigError for a K that the generator does not have.
    """

    def __init__(self, interval: str, subject: Subject) -> None:
        super().__init__(interval)
        self.subject = subject
        self.lengths = shown_lengths(subject.lengths)
        subject.check(self.lengths)

    @override
    def look(self, step: int, logger: Logger | None = None) -> Path:
        """Draw the average as it is now. Every rank must call it."""
        subject = self.subject
        own = self.lengths[dist.get_global_rank() :: dist.get_world_size()]
        made = _shared(subject, lambda: {k: subject.row(k) for k in own})
        path = Path(subject.run.out) / "pictures" / f"{subject.title}-{step:08d}.png"
        if dist.get_global_rank() == 0:
            rows = subject.originals() | {f"K = {k}": made[k] for k in self.lengths}
            grid = image_grid(list(rows.values()), list(rows), subject.columns, LIGHT)
            png = to_png(grid, LIGHT)
            write_whole(path, png)
            if logger is not None:
                image = np.array(Image.open(io.BytesIO(png)).convert("RGB"))  # [height, width, 3]
                logger.log_images(
                    image, f"pictures/{subject.title}", channels_last=True, step=step,
                    use_table=False,
                )  # fmt: skip
            with logging_redirect_tqdm():
                log.info("picture after step %d | %s", step, path)
        return path


def _shared(subject: Subject, work: Callable[[], dict[int, Any]]) -> dict[int, Any]:
    """What every rank's `work` makes of the average, together; an error of one is raised on all."""
    made, error = {}, None
    with subject.average():
        try:
            made = work()
        except LGMError as found:
            error = found
    raise_everywhere(error)
    return {key: value for part in dist.all_gather_object(made) for key, value in part.items()}


def record(
    out: Path, step: int, rows: list[dict[str, Any]], lines: list[str], logger: Logger | None
) -> None:
    """Write the rows of a step: a line each in `<run>/evaluation.jsonl`, and to the loggers.

    Lines of this step and later ones, which are from before a kill, are replaced.

    Args:
        out: Folder of the run.
        step: Steps that the average has.
        rows: Each with label, num_images, metrics and names.
        lines: What the console says.
        logger: Gets `evaluation/<label>/<metric>`.
    """
    if logger is not None:
        named = {(row["label"], k): v for row in rows for k, v in row["metrics"].items()}
        metrics = {f"evaluation/{label}/{k}": value for (label, k), value in named.items()}
        logger.log_metrics(metrics, step=step)
    if dist.get_global_rank() == 0:
        with logging_redirect_tqdm():
            for line in lines:
                log.info("evaluation after step %d | %s", step, line)
        path = out / "evaluation.jsonl"
        kept = path.read_text().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in kept if json.loads(line)["step"] < step]
        new = [
            json.dumps({key: row[key] for key in ("label", "num_images", "metrics", "names")}
                       | {"step": step}) + "\n"
            for row in rows
        ]  # fmt: skip
        write_whole(path, "".join([*kept, *new]))
