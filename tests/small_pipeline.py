"""A small pipeline for tests: images, a tokenizer bundle with random weights, latents."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from forked_commands import run_forked
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def run_command(
    *args: str | Path,
    ranks: int = 0,
    timeout: float = 800,
    fresh: bool = False,
    prepare: Callable[[], object] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands, plainly or as `ranks` ranks.

    In forked processes that have imported everything and call `prepare` first, or (`fresh`) in a
    new interpreter. The timeout ends what hangs, on any machine.
    """
    if not fresh:
        return run_forked(args, ROOT, ranks=ranks, timeout=timeout, prepare=prepare)
    assert prepare is None
    assert ranks == 0
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_user_error(result: subprocess.CompletedProcess, *texts: str) -> None:
    """Exit status 2, the texts in stderr, and no traceback."""
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr + result.stdout
    for text in texts:
        assert text in result.stderr


@dataclass(frozen=True)
class SmallPipeline:
    """Paths of the small pipeline, and configurations for it."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def latents(self) -> Path:
        return self.root / "latents"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    def tokenizer_config(self, out: Path, **changes: object) -> Path:
        """A YAML file of a tokenizer run of 10 steps."""
        values = {
            "task": "tokenizer",
            "model": {
                "size": "tiny",
                "image_size": 32,
                "patch_size": 8,
                "num_base_tokens": 16,
                "latent_dim": 8,
                "codebook_size": 32,
                "latent_init": "aligned",
            },
            "data": {"path": str(self.images), "num_workers": 0},
            "lengths": {"choices": [4, 8, 16], "weights": [2, 2, 1]},
            "optimizer": {"lr": 1e-3, "clip_norm": 1.0},
        }
        return _write(out, values, changes)

    def generator_config(self, out: Path, **changes: object) -> Path:
        """A YAML file of a generator run of 10 steps."""
        values = {
            "task": "generator",
            "tokenizer": str(self.tokenizer),
            "model": {
                "size": "tiny",
                "latent_dim": 8,
                "num_base_tokens": 16,
                "num_classes": 17,
            },
            "data": {"path": str(self.latents), "num_workers": 0},
            "lengths": {"choices": [8, 4, 16]},
            "optimizer": {"lr": 1e-3},
        }
        return _write(out, values, changes)

    def elit_config(self, out: Path, **changes: object) -> Path:
        """A YAML file of an ELIT run of 10 steps on pixels, budgets drawn at random."""
        values = {
            "task": "spatial_generator",
            "model": {
                "size": "tiny",
                "patch_size": 4,
                "num_classes": 17,
                "interface": {"split": "declared", "group_size": 2, "position_rows": 64},
            },
            "space": {"kind": "pixels", "image_size": 32, "flip": True},
            "data": {"path": str(self.images), "num_workers": 0},
            "lengths": {"choices": [64, 48, 32, 16], "weights": [1, 1, 1, 2]},
            "optimizer": {"lr": 1e-3},
        }
        return _write(out, values, changes)


def _write(out: Path, values: dict[str, object], changes: dict[str, object]) -> Path:
    """What all runs share, their own values, and what a test changes."""
    common = {
        "run_name": out.name,
        "out": str(out),
        "ema": {"decay": 0.9},
        "train": {"max_duration": "10ba", "global_batch_size": 8, "precision": "fp32"},
        "checkpoint": {"interval": "4ba"},
        "logging": {"interval": 3, "progress_bar": False},
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(common | values | changes))
    return path


def metrics(out: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path, steps: int) -> list[float]:
    """Of a finished run, every step once."""
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(steps))
    return [row["loss"] for row in rows]


def assert_same_run(out: Path, expected: Path, steps: int, tolerance: float) -> None:
    """Losses and averaged weights of two finished generator runs."""
    found, wanted = (losses(run, steps) for run in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    weights, other = (load_file(run / "bundle/generator.safetensors") for run in (out, expected))
    assert weights.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=tolerance)


def random_generator(pipeline: SmallPipeline) -> Path:
    """A generator bundle on the small tokenizer, random weights, legacy noise."""
    from lgm_scale.families.lgm.bundle import save_lgm_bundle
    from lgm_scale.families.lgm.config import LGMModelConfig
    from lgm_scale.families.lgm.latent_stats import STATS_NAME, LatentStats
    from lgm_scale.families.lgm.network import build_merge_dit

    config = LGMModelConfig(size="tiny", latent_dim=8, num_base_tokens=16, num_classes=17)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in build_merge_dit(config).state_dict().items()
    }
    folder = pipeline.root / "random-generator"
    stats = LatentStats.load(pipeline.latents / STATS_NAME)
    classes = tuple(f"class {index}" for index in range(17))
    training = {"steps": 0, "config": {"objective": {"noise_scale": "legacy"}}}
    save_lgm_bundle(folder, config, weights, stats, classes, pipeline.tokenizer, training)
    return folder


def train_in_process(
    path: Path, *overrides: str, on_step: Callable[[int, dict], object] = lambda step, batch: None
) -> Path:
    """Run the training of a configuration, here. `on_step` sees each step's batch beforehand."""
    from lgm_scale.checkpoint.run_folder import RunFolder
    from lgm_scale.config.rules import load_training_run
    from lgm_scale.train import train
    from lgm_scale.training.callbacks import StepKeys

    config = load_training_run(str(path), list(overrides), 1, has_gpu=False)
    start = StepKeys.batch_start

    def batch_start(self, state, logger):
        start(self, state, logger)
        on_step(state.batch["step"], state.batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepKeys, "batch_start", batch_start)
        train(config, RunFolder(Path(config.out), config))
    return Path(config.out)


class Steps:
    """An `on_step` that notes what each step got, and interrupts the run before step `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.seen: dict[int, tuple[int, list[int]]] = {}
        """Step -> K and sample ids."""

    def __call__(self, step: int, batch: dict) -> None:
        if step == self.stop:
            raise KeyboardInterrupt
        self.seen[step] = (batch["num_tokens"], batch["sample_ids"].tolist())
