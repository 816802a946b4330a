"""The kinds of job: which command each runs, what it is called, what it makes. Free of torch.

Everything that can be said about a job without its cluster is here; every problem of its
configuration is told before anything is submitted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lgm_scale.config.loading import read_yaml
from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.sweep.rules import check_sweep, load_sweep


@dataclass(frozen=True)
class Tool:
    """A command that takes options instead of a configuration: `key=value` becomes one."""

    script: str
    positional: tuple[str, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    out: str
    """The key that names what it makes."""
    ranks: bool
    """Whether it spreads over ranks."""


TOOLS = {
    "convert": Tool(
        "data_tools/images_to_mds.py",
        positional=("source",),
        required=("out",),
        optional=("image_size", "workers", "shard_size", "compression"),
        out="out",
        ranks=False,
    ),
    "encode": Tool(
        "data_tools/encode_latents.py",
        positional=(),
        required=("images", "out"),
        optional=("encoder", "tokenizer", "vae", "image_size", "batch_size", "shard_size"),
        out="out",
        ranks=True,
    ),
}

DEFAULT_CONFIG = {"train": "yamls/dit_xl.yaml", "tokenizer": "yamls/tokenizer_b.yaml"}
KINDS = ("train", "tokenizer", "encode", "eval", "convert")


@dataclass(frozen=True)
class Job:
    """One command for all ranks.

    Args:
        name: Name of the job in Slurm; a second live job of this name is refused.
        script: The command, as a path inside the code.
        config: YAML file that goes first, or None.
        parts: What each element of an array adds; empty for one job.
        ranks: Whether the command spreads over ranks; otherwise it has one.
    """

    kind: str
    name: str
    out: str
    script: str
    config: Path | None
    arguments: tuple[str, ...]
    parts: tuple[str, ...] = ()
    run: TrainingRun | None = None
    ranks: bool = True

    @property
    def folder(self) -> Path:
        """Where launches of this job keep code, logs and records.

        Inside a run's folder; beside a data set, which is complete or absent.
        """
        if "://" in self.out:
            return Path("runs") / "slurm" / self.name
        out = Path(self.out)
        return out.with_name(out.name + ".slurm") if self.kind in TOOLS else out / "slurm"


def describe_job(
    kind: str,
    config: str | None,
    words: list[str],
    world_size: int,
    *,
    parts: int | None = None,
    inputs_exist: bool = True,
) -> Job:
    """Read and check a job.

    `config` None takes the kind's own; `words` are `key=value` overrides, or options of a tool.
    Where another job makes the input, it need not be there yet (`inputs_exist`).

    Raises: ConfigError with every problem.
    """
    if parts is not None and kind != "eval":
        raise ConfigError(f"--array: {parts} jobs of kind {kind}; only a sweep (eval) is split")
    if parts is not None and parts < 2:
        raise ConfigError(f"--array: {parts}; an array has 2 jobs or more")
    if kind in TOOLS:
        if config is not None:
            raise ConfigError(f"--config: {config}; {kind} has no configuration, but key=value")
        return _tool(kind, TOOLS[kind], words)
    config = config or DEFAULT_CONFIG.get(kind)
    if config is None:
        raise ConfigError("--config: missing; an evaluation has no default, name its YAML file")
    if kind == "eval":
        return _sweep(config, words, parts, inputs_exist)
    run = load_training_run(config, words, world_size, has_gpu=None)
    right = run.task if run.task in KINDS else "train"  # most tasks have no kind of their own
    if kind != right:
        raise ConfigError(
            f"--job: {kind} does not run {config}, which is a {run.task}; give --job {right}"
        )
    return Job(
        kind, run.run_name, run.out, "lgm_scale/train.py", Path(config), tuple(words), run=run
    )


def _sweep(config: str, words: list[str], parts: int | None, inputs_exist: bool) -> Job:
    if inputs_exist:
        sweep = load_sweep(config, words)
    else:  # its files are made by the jobs before it: types are all that can be checked
        sweep = check_sweep(read_yaml(config, words), config, lambda _: [], {})
    split = tuple(f"part={index}/{parts}" for index in range(parts or 0))
    name = f"eval-{Path(sweep.out).name}"
    return Job("eval", name, sweep.out, "eval/sweep.py", Path(config), tuple(words), parts=split)


def _tool(kind: str, tool: Tool, words: list[str]) -> Job:
    values = _pairs(words)
    known = (*tool.positional, *tool.required, *tool.optional)
    problems = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            problems.append(f"{key}: unknown key of {kind}; {hint}")
    problems += [
        f"{key}: missing; {kind} needs {key}=..."
        for key in (*tool.positional, *tool.required)
        if key not in values
    ]
    if kind == "encode":
        problems += _encoder(values)
    if problems:
        raise ConfigError(problems, f"--job {kind}")
    options = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in values.items()
        if key not in tool.positional
    ]
    out = values[tool.out]
    arguments = (*(values[key] for key in tool.positional), *options)
    name = f"{kind}-{Path(out).name}"
    return Job(kind, name, out, tool.script, None, arguments, ranks=tool.ranks)


def _encoder(values: Mapping[str, str]) -> Iterator[str]:
    """The network that encodes; what else it needs, encode_latents.py says itself."""
    key = "vae" if values.get("encoder") == "sd-vae" else "tokenizer"
    if key not in values:
        yield (
            f"{key}: missing; encode needs tokenizer=BUNDLE, or encoder=sd-vae and vae=FOLDER for "
            "generators on a grid"
        )


def _pairs(words: list[str]) -> Mapping[str, str]:
    malformed = [word for word in words if "=" not in word.lstrip("=")]
    if malformed:
        raise ConfigError([f"override {word!r}: write it as key=value" for word in malformed])
    return dict(word.split("=", 1) for word in words)
