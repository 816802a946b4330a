"""How images are sampled: the settings, the time grid they make, and the network rows they cost.

Free of torch, so that rules of a sweep are heard before a network is built.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from fractions import Fraction
from typing import Any

from lgm_scale.config.schema import STRICT
from lgm_scale.errors import ConfigError

_TIME_TOLERANCE = 1e-9


class CFGRescale(str, Enum):
    """NONE: v_u + w (v_c - v_u). PER_POSITION: v_c + (w - 1) / size_j (v_c - v_u).

    PER_POSITION belongs to the noise-scale correction: a large cluster has less noise, so its
    guidance is divided by its size. On a grid nothing is merged, and both are the first.
    """

    NONE = "none"
    PER_POSITION = "per_position"


class Guidance(str, Enum):
    """What the weak branch is, whose difference from the strong one is followed w times.

    CFG: without the class, at `uncond_num_tokens` or as many tokens as the step has.
    AUTOGUIDANCE: with the class, at `uncond_num_tokens`, which are fewer.
    """

    CFG = "cfg"
    AUTOGUIDANCE = "autoguidance"


class Solver(str, Enum):
    """EULER: one evaluation per step. HEUN: two (trapezoid), but one in the last step.

    MEAN_FLOW: one per step, of the average velocity over the step; for networks that give it.
    Training draws t below 1, so no solver asks the network for the velocity at t = 1.
    """

    EULER = "euler"
    HEUN = "heun"
    MEAN_FLOW = "mean_flow"


def _setting(help: str, default: Any) -> Any:
    """A field with what its flag's help says."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How images are sampled: the one schema of YAML files, sweeps, pipelines and flags.

    Defaults are the published ones of merged tokens; a family of generators may have others
    (`GeneratorFamily.sampler_defaults`). Settings without meaning raise ConfigError, all at once.
    """

    __pydantic_config__ = STRICT
    cfg_scale: float = _setting("guidance w; 1 turns it off", 1.0)
    cfg_interval: tuple[float, float] = _setting(
        "times, ends included, between which guidance is on", (0.15, 1.0)
    )
    cfg_rescale: CFGRescale = _setting(
        "whether guidance is divided by the size of each cluster", CFGRescale.PER_POSITION
    )
    num_steps: int = _setting("points of the time grid: 25 points are 24 Euler steps", 25)
    timestep_shift: float = _setting(
        "a of t' = a t / (1 + (a - 1) t): below 1, more steps are near the noise", 0.2
    )
    solver: Solver = _setting(
        "one evaluation of the network per step, or two, or one of the average velocity",
        Solver.EULER,
    )
    uncond_num_tokens: int | None = _setting(
        "tokens of guidance's weak branch, or of the step where that has fewer", None
    )
    length_schedule: tuple[tuple[float, int], ...] = _setting(
        "growing length: (t, K) pairs; from shifted time t on, steps run at K. The first t is 0, "
        "the last K is the length asked for; empty: one length",
        (),
    )
    guidance: Guidance = _setting(
        "what the weak branch lacks: the class, or with autoguidance tokens alone", Guidance.CFG
    )

    def __post_init__(self) -> None:
        """Refuse settings without meaning, all at once."""
        schedule = tuple((float(t), int(num_tokens)) for t, num_tokens in self.length_schedule)
        object.__setattr__(self, "length_schedule", schedule)
        object.__setattr__(self, "cfg_interval", tuple(map(float, self.cfg_interval)))
        problems = [
            *self._enum_problems("cfg_rescale", CFGRescale),
            *self._enum_problems("solver", Solver),
            *self._enum_problems("guidance", Guidance),
            *self._number_problems(),
        ]
        if not problems and schedule:
            problems = self._schedule_problems()
        if problems:
            raise ConfigError(problems, "sampler")

    def _number_problems(self) -> list[str]:
        lo, hi = self.cfg_interval
        problems = []
        if self.num_steps < 2:
            problems.append(f"num_steps: {self.num_steps} grid points; needs 2 or more")
        if not math.isfinite(self.cfg_scale):
            problems.append(f"cfg_scale: {self.cfg_scale} is not finite")
        elif self.cfg_scale < 1:
            problems.append(f"cfg_scale: {self.cfg_scale} is below 1; 1 turns guidance off")
        if not 0 <= lo <= hi <= 1:
            problems.append(f"cfg_interval: ({lo}, {hi}) must be ordered and inside [0, 1]")
        if not 0 < self.timestep_shift < math.inf:
            problems.append(f"timestep_shift: {self.timestep_shift} must be above 0, and finite")
        if self.solver is Solver.MEAN_FLOW and (self.cfg_scale > 1 or self.uncond_num_tokens):
            problems.append(
                "solver: mean_flow has no weak branch, for guidance is in the weights; set "
                "cfg_scale to 1 and leave uncond_num_tokens out, or take solver euler, which "
                "generators of the velocity need"
            )
        if self.uncond_num_tokens is not None and self.uncond_num_tokens < 1:
            problems.append(f"uncond_num_tokens: {self.uncond_num_tokens} must be 1 or more")
        if self.guidance is Guidance.AUTOGUIDANCE and self.uncond_num_tokens is None:
            problems.append(
                "guidance: autoguidance needs uncond_num_tokens, the fewer tokens of its weak "
                "branch; set it, or take guidance cfg"
            )
        return problems

    def _enum_problems(self, name: str, values: type[Enum]) -> list[str]:
        """Take a plain string for a member; say so if there is none of that name."""
        given = getattr(self, name)
        try:
            object.__setattr__(self, name, values(given))
        except ValueError:
            return [f"{name}: {given!r} is unknown; use {' or '.join(m.value for m in values)}"]
        return []

    def _schedule_problems(self) -> list[str]:
        text = f"length_schedule: {[list(entry) for entry in self.length_schedule]}"
        times = [t for t, _ in self.length_schedule]
        lengths = [num_tokens for _, num_tokens in self.length_schedule]
        last_start = self.grid()[-2]
        problems = []
        if times[0] != 0 or any(b <= a for a, b in itertools.pairwise(times)):
            problems.append(f"{text} must start at t = 0 and rise in t")
        elif times[-1] > last_start + _TIME_TOLERANCE:
            problems.append(
                f"{text} never reaches its last length: the last of {self.num_steps - 1} steps "
                f"starts at t = {last_start:.4g}"
            )
        if lengths[0] < 1 or any(b < a for a, b in itertools.pairwise(lengths)):
            problems.append(f"{text} must not shrink: clusters are split, never joined")
        return problems

    @property
    def nested(self) -> bool:
        """Whether more than one cut of the merge tree is used."""
        return self.uncond_num_tokens is not None or bool(self.length_schedule)

    def grid(self) -> list[float]:
        """The shifted time grid, from 0 to 1."""
        shift, count = self.timestep_shift, self.num_steps
        return [shift * t / (1 + (shift - 1) * t) for t in _even_grid(count)]

    def guided(self, t: float) -> bool:
        """Whether an evaluation at t is guided."""
        return self.cfg_scale > 1 and self.cfg_interval[0] <= t <= self.cfg_interval[1]

    def length_at(self, t: float, num_tokens: int) -> int:
        """Tokens of the step that starts at t, when `num_tokens` are asked for.

        Raises: ConfigError if the schedule ends at another length.
        """
        if not self.length_schedule:
            return num_tokens
        if self.length_schedule[-1][1] != num_tokens:
            raise ConfigError(
                f"length_schedule: it ends at {self.length_schedule[-1][1]} tokens, but "
                f"num_tokens is {num_tokens}; make them equal"
            )
        begun = [k for start, k in self.length_schedule if start <= t + _TIME_TOLERANCE]
        return begun[-1]

    def uncond_length(self, num_tokens: int) -> int:
        """Tokens of the weak branch of a step at `num_tokens`."""
        return min(self.uncond_num_tokens or num_tokens, num_tokens)

    def check_guidance(self, num_tokens: int) -> None:
        """Refuse autoguidance whose weak branch is not weaker, when `num_tokens` are asked for.

        Raises: ConfigError naming the guided step's length.
        """
        if self.guidance is not Guidance.AUTOGUIDANCE:
            return
        weak = self.uncond_num_tokens
        assert weak is not None  # a rule of the configuration
        lengths = [self.length_at(start, num_tokens) for start, t in self.evaluations()
                   if self.guided(t)]  # fmt: skip
        least = min([num_tokens, *lengths])
        if weak >= least:
            where = "num_tokens is" if least == num_tokens else "length_schedule guides a step at"
            raise ConfigError(
                f"uncond_num_tokens: {weak}; autoguidance needs fewer tokens in its weak branch "
                f"than in the strong one, and {where} {least}; lower it, or take guidance cfg"
            )

    def evaluations(self) -> list[tuple[float, float]]:
        """Every network evaluation, in order: (start of its step, its own time)."""
        times = []
        for t, t_next in itertools.pairwise(self.grid()):
            times.append((t, t))
            if self.corrects(t_next):
                times.append((t, t_next))
        return times

    def corrects(self, t_next: float) -> bool:
        """Whether the step that ends at t_next evaluates the velocity there, too."""
        return self.solver is Solver.HEUN and t_next < 1 - _TIME_TOLERANCE

    def num_forwards(self) -> int:
        """Network rows per image: one for an unguided evaluation, two for a guided one."""
        return sum(2 if self.guided(t) else 1 for _, t in self.evaluations())

    def rows(self, num_tokens: int) -> dict[int, int]:
        """Network rows per image at each length, when `num_tokens` are asked for."""
        rows: Counter[int] = Counter()
        for start, t in self.evaluations():
            length = self.length_at(start, num_tokens)
            rows[length] += 1
            if self.guided(t):
                rows[self.uncond_length(length)] += 1
        return dict(rows)

    def settings(self) -> dict[str, Any]:
        """All fields as plain values, which make the same configuration again."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}

    def lengths(self, num_tokens: int) -> set[int]:
        """Every number of tokens that is named, when `num_tokens` are asked for."""
        weak = set() if self.uncond_num_tokens is None else {self.uncond_num_tokens}
        return {num_tokens} | weak | {k for _, k in self.length_schedule}


def _even_grid(count: int) -> list[float]:
    """Points from 0 to 1, to the bit those of `torch.linspace` in float64.

    torch counts from the nearer end and rounds once, as a fused multiply-add does: hence the
    fractions. Images depend on these bits.
    """
    step = 1.0 / (count - 1)
    near = [i * step for i in range(count // 2)]
    far = [float(1 - (count - 1 - i) * Fraction(step)) for i in range(count // 2, count)]
    return near + far


def outside_lengths(lengths: Iterable[int], low: int, high: int) -> Iterator[str]:
    """The problem of K that a merge tree of `high` tokens and `low` blocks does not have."""
    outside = [k for k in lengths if not low <= k <= high]
    if outside:
        yield (
            f"lengths {outside} outside [{low}, {high}], the range of this bundle's merge tree "
            f"({low} blocks that never merge, {high} base tokens)"
        )
