"""The measurement of a sweep: its jobs, its rows, and results.json.

`measure` is the command's work; `Sweep` is the same for whoever has a pipeline already, such as
a callback during training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist

from lgm_scale import __version__
from lgm_scale.config.loading import to_dict
from lgm_scale.evaluation.engine.chunks import Job
from lgm_scale.evaluation.engine.parts import Part, join_ranks
from lgm_scale.evaluation.engine.rows import FORMAT, VERSION
from lgm_scale.evaluation.engine.stages import Engine, RowPlan
from lgm_scale.evaluation.features.spaces import Spaces
from lgm_scale.evaluation.images import ValidationImages
from lgm_scale.evaluation.metrics.catalogue import (
    FASHION,
    METRICS,
    Selection,
    compute,
    describe_metrics,
    metric_name,
    select,
    warn_few_images,
)
from lgm_scale.evaluation.metrics.image_metrics import PerceptualDistance
from lgm_scale.evaluation.metrics.scores import FIXED_IS_SPLITS
from lgm_scale.evaluation.reconstructions.plans import ReconstructionPlans
from lgm_scale.evaluation.references.files import Reference, check_reference, load_reference
from lgm_scale.evaluation.sweep.config import Cell, SearchConfig, SweepConfig, expand
from lgm_scale.evaluation.sweep.results import headline, loss_per_length
from lgm_scale.evaluation.sweep.samples import NUM_SHOWN, SampleFeatures, work_of, write_samples
from lgm_scale.evaluation.sweep.search import next_cells, winners
from lgm_scale.families.base import families
from lgm_scale.merging.tree import TREE_NAME
from lgm_scale.pipeline import Pipeline, load_pipeline
from lgm_scale.storage.files import write_json

PIXELS = "(x + 1) / 2, clipped to [0, 1], {} to 8 bits"


def measure(config: SweepConfig, reduce_only: bool = False) -> dict[str, Any] | None:
    """Make what is missing; return results on every rank, or None if this was a part.

    With `reduce_only` it makes no image, and refuses if a chunk is missing.
    """
    losses = loss_per_length(config.metrics_log) if config.metrics_log else {}
    device = join_ranks()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    pipe = load_pipeline(config.bundle, device, dtype)
    files = pipe.info["files"]
    tokenizer = {name: files[name] for name in families()[pipe.kind].reconstruction_files}
    sweep = Sweep(config, pipe, files, tokenizer)
    if config.part is not None:
        sweep.make_part(Part.parse(config.part))
        return None
    return sweep.run(losses, reduce_only)


def load_spaces(config: SweepConfig, image_size: int, device: torch.device) -> Spaces:
    """Open the validation images and load the feature spaces that a sweep names."""
    images = None if config.images is None else ValidationImages(config.images, image_size)
    return Spaces.load(
        device, images, config.inception, config.dinov2, config.num_components,
        fashion_mnist=bool(set(FASHION) & set(config.metrics)),
    )  # fmt: skip


class Sweep:
    """One generator at many cells.

    Args:
        config: The sweep; its bundle is not read here.
        weights: What identifies the generator's weights: hashes of files; JSON values.
        tokenizer: What identifies its tokenizer and tree alone, where it has them.
    """

    def __init__(
        self,
        config: SweepConfig,
        pipe: Pipeline,
        weights: dict[str, Any],
        tokenizer: dict[str, Any],
        spaces: Spaces | None = None,
        quiet: bool = False,
    ) -> None:
        self.config, self.pipe, self.weights, self.quiet = config, pipe, weights, quiet
        self.protocol = pipe.protocol()
        for cell in expand(config):  # what cannot work is told before any work
            pipe.check(cell.sampler, cell.num_tokens)
        self.engine = Engine(Path(config.out), pipe.device, quiet)
        self.spaces = spaces or load_spaces(config, pipe.image_size, pipe.device)
        self.outer = load_reference(config.reference) if config.reference is not None else None
        check_reference(self.outer, self.spaces, pipe.image_size)
        self.samples = SampleFeatures(pipe, self.spaces.all, config)
        self.reconstructions = ReconstructionPlans(
            tokenizer=pipe.tokenizer,
            tree=pipe.tree,
            files=tokenizer,
            images=self.spaces.images,
            device=pipe.device,
            spaces=self.spaces,
            perceptual=self._perceptual(),
            reference=self.outer,
            chunk_size=config.chunk_size,
            batch_size=config.batch_size,
            metrics=config.metrics,
        )

    def _perceptual(self) -> PerceptualDistance | None:
        """What measures LPIPS, where there are reconstructions and its weights are given."""
        if self.config.vgg16 is None or self.pipe.tokenizer is None:
            return None
        return PerceptualDistance(self.config.vgg16, self.pipe.device)

    # --- plans --------------------------------------------------------------------------------

    @property
    def lengths(self) -> list[int]:
        """Every K of the sweep, ascending."""
        return sorted({cell.num_tokens for cell in expand(self.config)})

    @property
    def reference(self) -> Reference:
        """What samples are compared with; validation images only after their chunks were made."""
        return self.outer if self.outer is not None else self.reconstructions.validation

    def job(self, cell: Cell, num_images: int) -> Job:
        """The job of the samples of a cell."""
        config = self.config
        protocol = {
            "kind": "samples",
            "lgm_scale": __version__,
            "weights": self.weights,
            "cell": cell.values(),
            **self.protocol,
            "seed": config.seed,
            "labels": "image index mod number of classes",
            "pixels": PIXELS.format({"round": "rounded", "truncate": "cut"}[config.quantise]),
            "precision": config.precision,
            "features": self.spaces.describe(),
            "pixels_kept": "all" if config.save_npz else NUM_SHOWN,
        }
        name = (
            f"samples-k{cell.num_tokens:04d}-w{cell.sampler.cfg_scale:g}-s{cell.sampler.num_steps}"
        )
        return Job(name, protocol, num_images, config.chunk_size, partial(self.samples, cell))

    def plan(self, cell: Cell, num_images: int) -> RowPlan:
        """How the row of a cell is made, at a number of images."""
        selection = self.selection(num_images)
        job = self.job(cell, num_images)
        protocol = {
            **job.protocol,
            "num_images": num_images,
            "reference": self.reference.description,
            "metrics": describe_metrics(selection, num_images, self.reference),
            "selected": list(selection.on),
        }
        finish = partial(self._finish, cell, selection)
        name = f"{job.name}-n{num_images}"
        if "is" in selection.on:
            # Earlier versions took 10 splits of any number of images: rows that they finished
            # stand, and say so. Without them, in new rows, it is the definition of today.
            metrics = protocol["metrics"] | {"is": FIXED_IS_SPLITS}
            earlier = protocol | {"metrics": metrics}
            if self.engine.rows.find(name, earlier) is not None:
                protocol = earlier
        return RowPlan(name, job, protocol, selection.statistics_features, finish, cell.label)

    def selection(self, num_images: int) -> Selection:
        """Which metrics of this many samples can be computed, and why not the others."""
        return select(self.config.metrics, self.spaces.outputs, self.reference, num_images)

    def _finish(
        self, cell: Cell, selection: Selection, plan: RowPlan, engine: Engine
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        statistics = engine.statistics(plan.job, plan.sums)
        numbers = compute(
            selection, statistics, partial(engine.features, plan.job), self.reference,
            engine.device, np.arange(plan.job.count) % self.pipe.num_classes,
        )  # fmt: skip
        seconds, devices = engine.seconds(plan.job)
        making = seconds["sampling"] + seconds["decoding"]
        count = plan.job.count
        names = {
            key: metric_name(key, count, self.spaces.described(METRICS[key].feature), "g")
            for key in selection.on
        }
        row = {
            "kind": "samples",
            "cell": cell.values(),
            "label": cell.label,
            "num_images": count,
            "metrics": numbers,
            "names": names,
            "work": work_of(self.pipe, cell),
            "run": {
                "seconds": seconds,
                "devices": devices,
                "images_per_second": count / making,
                "sampling_share": making / math.fsum(seconds.values()),
            },
        }
        if self.config.save_npz and count == self.config.num_images:
            row["npz"] = str(write_samples(engine, plan.job, Path(self.config.out), plan.name))
        shown = min(NUM_SHOWN, count)
        return row, {"images": engine.first_arrays(plan.job, "pixels", shown)}

    # --- runs ---------------------------------------------------------------------------------

    def make_part(self, part: Part) -> None:
        """Make this part of all chunks that can be made now."""
        jobs = self._jobs_of_a_part()
        made = self.engine.make_chunks(jobs, part, f"part {part.index}/{part.count}", True)
        self._say(
            f"part {part.index}/{part.count}: {made} images made, the rest was there. When all "
            "parts are done, the same command without `part` computes the numbers"
        )

    def _jobs_of_a_part(self) -> list[Job]:
        """Jobs whose rows are not there yet, as far as that can be known without the images."""
        config, cells = self.config, expand(self.config)
        base = self.reconstructions.jobs(self.lengths)
        if not self.reconstructions.ready(self.engine, needed=self.outer is None):
            count = config.search.num_images if config.search else config.num_images
            trying = next_cells(cells, {}, config.search) if config.search else cells
            return [*base, *(self.job(cell, count) for cell in trying)]
        if config.search is None:
            plans = [self.plan(cell, config.num_images) for cell in cells]
        else:
            known = self._known(cells, config.search)
            plans = [
                self.plan(cell, config.search.num_images)
                for cell in next_cells(cells, known, config.search)
            ] or [
                self.plan(cell, config.num_images) for cell in winners(known, config.search.metric)
            ]
        return [*base, *(plan.job for plan in self.engine.open_plans(plans))]

    def _known(self, cells: Sequence[Cell], search: SearchConfig) -> dict[Cell, dict[str, float]]:
        """Metrics of the cells that a search has tried."""
        plans = [self.plan(cell, search.num_images) for cell in cells]
        rows = [self.engine.rows.find(plan.name, plan.protocol) for plan in plans]
        return {
            cell: row["metrics"] for cell, row in zip(cells, rows, strict=True) if row is not None
        }

    def run(self, losses: dict[int, dict[str, Any]], reduce_only: bool = False) -> dict[str, Any]:
        """Make what is missing, and reduce; return results on every rank. Rank 0 writes them."""
        start, config, may_compute = time.perf_counter(), self.config, not reduce_only
        originals = self.reconstructions.jobs(())
        self.engine.make_chunks(originals, Part(), "validation images", may_compute)
        self.reconstructions.reduce(self.engine)
        selection = self.selection(config.num_images)
        if self.engine.first:
            warn_few_images(selection, self.spaces.outputs, config.num_images)
        cells, searched = expand(config), []
        before, reconstructed = self.reconstructions.plans(self.lengths), []
        if config.search is not None:
            reconstructed, before = self._rows(before, "reconstructions", may_compute), []
            searched, cells = self._search(cells, config.search, may_compute)
        plans = [*before, *(self.plan(cell, config.num_images) for cell in cells)]
        rows = self._rows(plans, "sweep", may_compute)
        reconstructed, rows = reconstructed + rows[: len(before)], rows[len(before) :]
        floor = self._floor()
        for line in selection.off.values():
            self._say(line)
        results = {
            "format": FORMAT,
            "version": VERSION,
            "versions": {"lgm_scale": __version__, "torch": torch.__version__},
            "config": to_dict(config),
            "weights": self.weights,
            "reference": {"name": self.reference.name, **self.reference.description},
            "off": selection.off | self.reconstructions.off,
            **self._generator(),
            "training_loss": {str(k): loss for k, loss in losses.items()},
            "rows": rows,
            "searched": searched,
            "reconstructions": reconstructed,
            "run": {"ranks": dist.get_world_size(), "seconds": time.perf_counter() - start},
        }
        if floor is not None:
            results["floor"] = floor
        if self.engine.first:
            out = Path(config.out)
            if self.pipe.tree is not None:
                self.pipe.tree.save(out / "rows" / TREE_NAME)
            write_json(out / "results.json", results)
        dist.barrier()
        return results

    def _generator(self) -> dict[str, Any]:
        """What results say about the generator."""
        pipe = self.pipe
        return {
            "kind": pipe.kind,
            "merge_tree": pipe.tree is not None,
            "classes": list(pipe.classes),
            "num_base_tokens": pipe.num_base_tokens,
            "parameters": pipe.parameters(),
            "training_steps": pipe.info["training"].get("steps"),
        }

    def _floor(self) -> dict[str, Any] | None:
        """Row of the validation images themselves, where the classifier is the judge.

        Against the same reference as the samples: what real images get that nobody trained on.
        """
        plan = self.reconstructions.floor_plan()
        if plan is None:
            return None
        (row,) = self.engine.make_rows([plan])
        self._say(f"{plan.title:32s} {headline(row)}")
        return row

    def _search(
        self, cells: Sequence[Cell], search: SearchConfig, may_compute: bool
    ) -> tuple[list[dict[str, Any]], list[Cell]]:
        """Rows of the cells that were tried, and the best cells."""
        known: dict[Cell, dict[str, float]] = {}
        rows: list[dict[str, Any]] = []
        while trying := next_cells(cells, known, search):
            plans = [self.plan(cell, search.num_images) for cell in trying]
            found = self._rows(plans, "search", may_compute)
            rows += found
            known |= {c: row["metrics"] for c, row in zip(trying, found, strict=True)}
        in_order = {cell: known[cell] for cell in cells if cell in known}
        return rows, winners(in_order, search.metric)

    def _rows(self, plans: Sequence[RowPlan], what: str, may_compute: bool) -> list[dict[str, Any]]:
        """Rows of these plans: kept, or made through chunks and sums."""
        missing = self.engine.open_plans(plans)
        self.engine.make_chunks([plan.job for plan in missing], Part(), what, may_compute)
        self.engine.make_sums([(plan.job, plan.sums) for plan in missing])
        rows = self.engine.make_rows(plans)
        new = {plan.name for plan in missing}
        for plan, row in zip(plans, rows, strict=True):
            state = "done" if plan.name in new else "kept"
            self._say(f"{plan.title:32s} {state}   {headline(row)}")
        self.engine.clean(plans, self.config.keep_features)
        dist.barrier()
        return rows

    def _say(self, line: str) -> None:
        if self.engine.first and not self.quiet:
            print(line, flush=True)
