"""The kinds of job: which command each runs, what it is called, what it makes. Free of torch.

Everything that can be said about a job without its cluster is here; every problem of its
configuration is told before anything is submitted.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lgm_scale.checkpoint.run_folder import RunFolder
from lgm_scale.config.inputs import ToCome
from lgm_scale.config.loading import read_yaml
from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.sweep.rules import broken_rules, check_sweep, load_sweep
from lgm_scale.published import COMMAND, names_at


@dataclass(frozen=True)
class Tool:
    """A command that takes options instead of a configuration: `key=value` becomes one."""

    script: str
    positional: tuple[str, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    flags: tuple[str, ...]
    """Options without a value: `key=true` sets one."""
    inputs: tuple[str, ...]
    """Keys that name what it reads."""
    out: str
    """The key that names what it makes."""
    ranks: bool
    """Whether it spreads over ranks."""


TOOLS = {
    "convert": Tool(
        "data_tools/images_to_mds.py",
        positional=("source",),
        required=("out",),
        optional=(
            *("staging", "image_size", "workers", "shard_size", "compression", "classes"),
            *("labels", "image_column", "label_column"),
        ),
        flags=("skip_unreadable",),
        inputs=("source", "classes", "labels"),
        out="out",
        ranks=False,
    ),
    "encode": Tool(
        "data_tools/encode_latents.py",
        positional=(),
        required=("images", "out"),
        optional=(
            *("encoder", "tokenizer", "vae", "image_size", "batch_size", "shard_size"),
            *("features", "cache", "staging", "compression", "workers"),
        ),
        flags=(),
        inputs=("images", "tokenizer", "vae"),
        out="out",
        ranks=True,
    ),
    "reference": Tool(
        "eval/reference.py",
        positional=("source",),
        required=("out",),
        optional=(
            *("inception", "dinov2", "image_size", "keep_features", "name"),
            *("batch_size", "chunk_size"),
        ),
        flags=("fashion_mnist",),
        inputs=("source", "inception", "dinov2"),
        out="out",
        ranks=True,
    ),
}

DEFAULT_CONFIG = {"train": "yamls/dit_xl.yaml", "tokenizer": "yamls/tokenizer_b.yaml"}
_MADE = ("bundle", "images", "reference")
"""Inputs of a sweep that jobs before it may make; the others are files of other people."""
KINDS = ("train", "tokenizer", "encode", "eval", "convert", "reference")


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
    has_gpu: bool | None = None,
    to_come: ToCome | None = None,
    allow_change: Sequence[str] = (),
) -> Job:
    """Read and check a job.

    `config` None takes the kind's own; `words` are `key=value` overrides, or options of a tool.
    `to_come` are those of its inputs that jobs before it will make; None looks for no file at all,
    where this machine does not see what the nodes see.

    Raises: ConfigError with every problem.
    """
    if parts is not None and kind != "eval":
        raise ConfigError(f"--array: {parts} jobs of kind {kind}; only a sweep (eval) is split")
    if parts is not None and parts < 2:
        raise ConfigError(f"--array: {parts}; an array has 2 jobs or more")
    if kind in TOOLS:
        if config is not None:
            raise ConfigError(f"--config: {config}; {kind} has no configuration, but key=value")
        return _tool(kind, TOOLS[kind], words, to_come)
    config = config or DEFAULT_CONFIG.get(kind)
    if config is None:
        raise ConfigError("--config: missing; an evaluation has no default, name its YAML file")
    if kind == "eval":
        return _sweep(config, words, parts, to_come)

    def problems(run: TrainingRun) -> list[str]:
        if to_come is None:
            return []
        return RunFolder(Path(run.out), run, allow_change).start_problems(to_come)

    run = load_training_run(config, words, world_size, has_gpu, problems)
    right = run.task if run.task in KINDS else "train"  # most tasks have no kind of their own
    if kind != right:
        raise ConfigError(
            f"--job: {kind} does not run {config}, which is a {run.task}; give --job {right}"
        )
    allowed = (word for key in allow_change for word in ("--allow-change", key))
    return Job(
        *(kind, run.run_name, run.out, "lgm_scale/train.py", Path(config)),
        (*words, *allowed),
        run=run,
    )


def output_of(kind: str, config: str | None, words: list[str]) -> list[Path]:
    """What a job will make, also one with problems; empty where that cannot be told."""
    config = config or DEFAULT_CONFIG.get(kind)
    try:
        values = _pairs(words) if kind in TOOLS or config is None else read_yaml(config, words)
    except ConfigError:
        return []
    return [Path(values["out"])] if isinstance(values.get("out"), str) else []


def _sweep(config: str, words: list[str], parts: int | None, to_come: ToCome | None) -> Job:
    values = read_yaml(config, words)
    made = [key for key in _MADE if to_come is not None and to_come(str(values.get(key)))]
    if to_come is None:  # this machine does not see the files: types are all that can be checked
        sweep = check_sweep(values, config, lambda _: [], {})
    elif not made:
        sweep = load_sweep(config, words)
    else:
        sweep = check_sweep(values, config, lambda read: broken_rules(read, made=made), {})
    split = tuple(f"part={index}/{parts}" for index in range(parts or 0))
    name = f"eval-{Path(sweep.out).name}"
    return Job("eval", name, sweep.out, "eval/sweep.py", Path(config), tuple(words), parts=split)


def _tool(kind: str, tool: Tool, words: list[str], to_come: ToCome | None) -> Job:
    values = _pairs(words)
    known = (*tool.positional, *tool.required, *tool.optional, *tool.flags)
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
    problems += [
        f"{key}: {values[key]} is neither true nor false"
        for key in tool.flags
        if values.get(key, "true") not in ("true", "false")
    ]
    if kind == "encode":
        problems += _encoder(values)
    problems += [
        f"{key}: {values[key]} is not there; {_how_to_get(values[key], kind)}"
        for key in tool.inputs
        if to_come is not None and key in values and not _is_there(values[key], to_come)
    ]
    if problems:
        raise ConfigError(problems, f"--job {kind}")
    options = [
        f"--{key.replace('_', '-')}" + ("" if key in tool.flags else f"={value}")
        for key, value in values.items()
        if key not in tool.positional and not (key in tool.flags and value == "false")
    ]
    out = values[tool.out]
    arguments = (*(values[key] for key in tool.positional), *options)
    name = f"{kind}-{Path(out).name}"
    return Job(kind, name, out, tool.script, None, arguments, ranks=tool.ranks)


def _how_to_get(path: str, kind: str) -> str:
    names = names_at(path)
    if names:
        return f"`{COMMAND} --fetch {' '.join(names)}` gets it"
    return f"name what {kind} reads, or make it first"


def _is_there(path: str, to_come: ToCome) -> bool:
    """Whether an input is there or will be; a pattern names files, object storage is not asked."""
    return "://" in path or to_come(path) or bool(glob.glob(path)) or Path(path).exists()


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
