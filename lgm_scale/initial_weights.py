"""The weights that a new run takes from the bundle in `init_from`, adapted where they can be.

The bundle is read once, before a run has a state of its own. What a family adapts, states and
refuses is a class derived from `InitialWeights`; without one, every weight must fit as it is. Torch
is imported inside functions: what cannot fit is told before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors import SafetensorError, safe_open
from typing_extensions import override

from lgm_scale.bundle import check_kind, read_bundle, read_info
from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import CheckpointError, ConfigError, LGMError
from lgm_scale.families.base import family_of, imported
from lgm_scale.storage.clients import is_remote

if TYPE_CHECKING:
    from torch import Tensor, nn

_KINDS = {"ema": "averaged weights (EMA)", "model": "weights without an average"}


class InitialWeights:
    """A bundle's weights as the start of a run. By default each must be there, in its shape.

    Args:
        run: Configuration of the run.
        folder: The bundle.
        info: Contents of its bundle.json.
    """

    adapted: tuple[str, ...] = ()
    """Weights that `adapt` is asked for, and whose shapes may differ."""
    new: tuple[str, ...] = ()
    """Beginnings of the names of weights that start new where the bundle has none of the name."""
    left: tuple[str, ...] = ()
    """Beginnings of the names of the bundle's weights that may be left out."""

    def __init__(self, run: Any, folder: str, info: dict[str, Any]) -> None:
        self.run = run
        self.folder = folder
        self.info = info

    def refused(self) -> Iterator[str]:
        """Lines `key: value; rule; fix` for what cannot be adapted. Free of torch."""
        yield from ()

    def stated(self, dataset: Any = None) -> Iterator[str]:
        """Lines about what is taken, adapted and left. `dataset` is None in a dry run."""
        training = self.info.get("training", {})
        what = _KINDS.get(training.get("weights"), "weights")
        if self.info["kind"] != self.run.task:
            what = f"the {self.run.task} in a {self.info['kind']} bundle"
        elif "imported" in training:
            what += f", imported from {training['imported']['file']}"
        elif "steps" in training:
            what += f" after {training['steps']:,} steps"
        yield f"{self.folder}: {what}; optimizer, step, schedule and average start new"
        if training.get("random_assets"):
            names = ", ".join(training["random_assets"])
            yield f"RANDOM WEIGHTS stood in for {names} when it was trained: it was a trial"

    def adapt(self, name: str, weight: Tensor, fresh: Tensor, dataset: Any) -> Tensor:
        """One of `adapted` in its shape here, from the bundle's and from that of a fresh start."""
        raise NotImplementedError

    def refuse(self, key: str, here: object, there: object, rule: str) -> str:
        """The line about a key that must be what it was."""
        return (
            f"{key}: {here} here, {there} in {self.folder} (init_from); {rule}; set {key}={there}, "
            "or leave init_from out"
        )

    def file(self, names: Iterable[str]) -> Path:
        """The file of the bundle that holds weights of these names. Raises: CheckpointError."""
        wanted, found = set(names), {}
        for file in self.info["files"]:
            if file.endswith(".safetensors"):
                with _opened(Path(self.folder) / file) as weights:
                    found[file] = len(wanted & set(weights.keys()))
        best = max(found, key=found.__getitem__, default="")
        if not found.get(best):
            raise CheckpointError(f"init_from: {self.folder} holds no weight of this network")
        return Path(self.folder) / best

    def misfits(self, net: nn.Module) -> list[str]:
        """Lines about weights that do not fit a network, which may be on the meta device."""
        here = {name: list(value.shape) for name, value in net.state_dict().items()}
        with _opened(self.file(here)) as weights:
            there = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118  # no mapping
        wrong = [
            f"{name} is {there.get(name, 'missing')} there, {here.get(name, 'not wanted')} here"
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
            and not (name in self.adapted and name in here and name in there)
            and not (name not in there and name.startswith(self.new))
            and not (name not in here and name.startswith(self.left))
        ]
        more = f" ({len(wrong)} such)" if len(wrong) > 1 else ""
        return [
            f"init_from: {self.folder} does not fit: {line}{more}; make `model` that of the "
            "bundle (`models` in its bundle.json), or leave init_from out"
            for line in wrong[:1]
        ]

    def load(self, net: nn.Module, dataset: Any) -> list[str]:
        """Copy the weights into a network, one by one. Returns: lines about what was done.

        Raises: ConfigError if one does not fit; CheckpointError.
        """
        import torch

        problems = self.misfits(net)
        if problems:
            raise ConfigError(problems)
        own = net.state_dict()
        with _opened(self.file(own)) as weights, torch.no_grad():
            for name in own.keys() & set(weights.keys()):
                weight, fresh = weights.get_tensor(name), own[name]
                if name in self.adapted:
                    weight = self.adapt(name, weight, fresh, dataset)
                fresh.copy_(weight)
        return list(self.stated(dataset))


class GeneratorInitialWeights(InitialWeights):
    """Of a generator, whose label table keeps the rows of classes that the bundle knows by name."""

    table: ClassVar[str] = "label_embed.table.weight"
    """Name of the table [classes + 1, C], whose last row is the null label."""
    adapted = (table,)

    def another_size(self, here: str, there: str) -> Iterator[str]:
        """The line about a `model.size` that is another in the bundle."""
        if here != there:
            rule = "width, depth and heads cannot be adapted"
            yield self.refuse("model.size", here, there, rule)

    def new_end_time(self, here: bool, there: bool) -> tuple[str, ...]:
        """What is new where the bundle's network gives the velocity and this one its average."""
        return ("end_embed.",) if here and not there else ()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the bundle's classes."""
        return tuple(self.info["classes"])

    def rows(self, names: Sequence[str]) -> list[int | None]:
        """Of each class here, its row in the bundle's table; None: it starts new.

        Classes are found by name, the second of a name by the second. A bundle that knows its
        classes by number alone gives its rows by number, if there are as many.
        """
        numbers = tuple(map(str, range(len(self.classes))))
        if self.classes == numbers and len(names) == len(numbers):
            return list(range(len(names)))
        there = {key: row for row, key in enumerate(_counted(self.classes))}
        return [there.get(key) for key in _counted(names)]

    @override
    def stated(self, dataset: Any = None) -> Iterator[str]:
        yield from super().stated(dataset)
        if "end_embed." in self.new:
            yield (
                "end times: the bundle's network gives the velocity, which is the average velocity "
                "at the first step, up to any end"
            )
        if dataset is None:
            here = self.run.model.num_classes
            yield (
                f"labels: {here} classes here, {len(self.classes)} in the bundle; rows of equal "
                "names are kept, others start new, the null row is kept"
            )
            return
        names = dataset.manifest.classes
        rows = self.rows(names)
        new = [name for name, row in zip(names, rows, strict=True) if row is None]
        kept = len(names) - len(new)
        unused = len(self.classes) - kept
        if not new and not unused:
            known = set(names) == set(self.classes)
            how = "name" if known else "number, for the bundle knows no names"
            yield f"labels: all {kept} rows and the null row are kept, by {how}"
        elif kept:
            text = f"labels: {kept} of {len(names)} rows are kept, by name"
            text += f"; new: {_listed(new)}" if new else ""
            yield text + f"; {unused} of the bundle are left out; the null row is kept"
        else:
            yield (
                f"labels: all {len(names)} rows start new, for no class here ({_listed(names)}) is "
                f"named as one of the bundle ({_listed(self.classes)}); the null row is kept"
            )

    @override
    def adapt(self, name: str, weight: Tensor, fresh: Tensor, dataset: Any) -> Tensor:
        table = fresh.clone()
        for row, source in enumerate(self.rows(dataset.manifest.classes)):
            if source is not None:
                table[row] = weight[source]
        table[-1] = weight[-1]
        return table


def initial_weights(run: TrainingRun, whole: bool = False) -> InitialWeights:
    """What a run with `init_from` takes from its bundle.

    `whole`: compare every file with its hash.

    Raises: CheckpointError for what is no bundle, or one of another kind.
    """
    folder = str(run.init_from)
    try:
        if is_remote(folder):
            raise CheckpointError(f"{folder}: a bundle is read from a local folder; copy it here")
        if Path(folder).is_file():
            raise CheckpointError(
                f"{folder} is a file; the folder of a bundle is needed. `python -m "
                "lgm_scale.release_import` makes one from a checkpoint of the methods' authors"
            )
        info = read_bundle(folder, run.task) if whole else read_info(folder)
        check_kind(info, folder, run.task)
        kind: type[InitialWeights] = imported(family_of(run).initial_weights)
        return kind(run, folder, info)
    except LGMError as error:
        raise CheckpointError(f"init_from: {error}") from error


def is_absent(folder: str) -> bool:
    """Whether nothing is at a local path: for a dry run, perhaps on another machine."""
    return not is_remote(folder) and not Path(folder).exists()


def init_problems(run: TrainingRun, to_come: Callable[[str], bool]) -> Iterator[str]:
    """Lines about a bundle in `init_from` that is not there or cannot be adapted. Torch-free.

    `to_come` says which folders are not looked for.
    """
    if run.init_from is None or to_come(run.init_from):
        return
    try:
        yield from initial_weights(run).refused()
    except LGMError as error:
        yield str(error)


def planned_lines(run: TrainingRun, net: nn.Module) -> list[str]:
    """What a dry run says of `init_from`. Raises: ConfigError if it does not fit `net`."""
    if run.init_from is None:
        return []
    if is_absent(run.init_from):
        return [f"init_from    {run.init_from} is not here: what it gives is told at the start"]
    start = initial_weights(run)
    problems = start.misfits(net)
    if problems:
        raise ConfigError(problems)
    return ["init_from    read at the first start alone:", *(f"  {t}" for t in start.stated())]


def resize_grid(table: Tensor, side: int) -> Tensor:
    """A table of a square grid's places for another grid, bicubic. Shapes: [h h, C] -> [s s, C]."""
    from torch.nn.functional import interpolate

    old = round(len(table) ** 0.5)
    if old == side:
        return table
    image = table.float().T.reshape(1, -1, old, old)
    resized = interpolate(image, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return resized.flatten(2)[0].T


def resize_rows(table: Tensor, count: int, segments: int) -> Tensor:
    """A table of learned rows for another number of them, within each of `segments` equal parts.

    More rows are interpolated along their index, fewer are a subset, evenly spread: rows need be
    no places in a row, and the mean of two tokens is none. Ours.

    Shapes: [N, C] -> [count, C].
    """
    import torch

    if len(table) == count:
        return table
    old = table.unflatten(0, (segments, -1))  # [S, n, C]
    there, here = old.shape[1], count // segments
    places = (torch.arange(here) + 0.5) * there / here
    if here < there:
        return old[:, places.long()].flatten(0, 1)
    places = (places - 0.5).clamp(0, there - 1)
    below = places.long()
    above = (below + 1).clamp(max=there - 1)
    return torch.lerp(old[:, below], old[:, above], (places - below)[:, None]).flatten(0, 1)


def _opened(path: Path) -> Any:
    """A file of weights, read lazily. Raises: CheckpointError."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from error


def _counted(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with how many of the same name come before it."""
    seen: Counter[str] = Counter()
    counted = []
    for name in names:
        counted.append((name, seen[name]))
        seen[name] += 1
    return counted


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
