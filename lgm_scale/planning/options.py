"""Options of `--dry-run`. Free of torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from lgm_scale.planning.hardware import GPU, GPUS, parse_memory, read_calibration

DEFAULT_UTILISATION = 0.3


@dataclass(frozen=True)
class PlanOptions:
    """What a dry run is asked for.

    Args:
        simulate: Simulate the training step: memory with activations, collectives, time.
        advise: Look for the fastest strategy that fits into `memory`.
        gpus: GPUs that times are predicted for.
        memory: Bytes of a GPU; None: that of each of `gpus`.
        utilisation: Share of the peak for the hours that are not simulated.
        price: Of one GPU for an hour; None: not asked.
    """

    simulate: bool = False
    advise: bool = False
    gpus: tuple[GPU, ...] = tuple(GPUS.values())
    memory: int | None = None
    utilisation: float = DEFAULT_UTILISATION
    price: float | None = None


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, which all go with `--dry-run`."""
    group = parser.add_argument_group("with --dry-run (docs/planning.md)")
    group.add_argument(
        "--simulate",
        action="store_true",
        help="simulate the training step: memory with activations, collectives, predicted time",
    )
    group.add_argument(
        "--advise",
        action="store_true",
        help="the fastest strategy, micro-batch and activation checkpointing that fit",
    )
    group.add_argument(
        "--gpu", choices=list(GPUS), help="plan for this one (hours: h100; --simulate: all)"
    )
    group.add_argument(
        "--gpu-memory",
        type=_size,
        metavar="SIZE",
        help="with --advise: 40GB or 40GiB (default: the GPU's)",
    )
    group.add_argument(
        "--calibration", metavar="FILE", help="measured figures of a GPU instead of our table's"
    )
    group.add_argument(
        "--utilisation",
        type=_share,
        metavar="SHARE",
        help=f"share of the peak, for hours without --simulate (default: {DEFAULT_UTILISATION})",
    )
    group.add_argument(
        "--price-per-gpu-hour", type=_positive, metavar="PRICE", help="in any currency"
    )


def plan_options(args: argparse.Namespace, parser: argparse.ArgumentParser) -> PlanOptions:
    """Read the options; the parser refuses those that mean nothing. Raises: ConfigError."""
    names = ("simulate", "advise", "gpu", "gpu_memory", "calibration", "utilisation")
    for name in (*names, "price_per_gpu_hour"):
        if getattr(args, name) and not args.dry_run:
            parser.error(f"--{name.replace('_', '-')} goes with --dry-run")
    if args.gpu and args.calibration:
        parser.error("--gpu: has no effect with --calibration, which is of one GPU; drop one")
    if args.gpu_memory and not args.advise:
        parser.error("--gpu-memory goes with --advise")
    gpus = tuple(GPUS.values())
    if args.calibration:
        gpus = (read_calibration(args.calibration),)
    elif args.gpu:
        gpus = (GPUS[args.gpu],)
    return PlanOptions(
        simulate=args.simulate,
        advise=args.advise,
        gpus=gpus,
        memory=args.gpu_memory,
        utilisation=args.utilisation or DEFAULT_UTILISATION,
        price=args.price_per_gpu_hour,
    )


def _refused(rule: str, text: str) -> Any:
    return argparse.ArgumentTypeError(f"{text!r} {rule}")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise _refused("must be a number above 0", text)
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise _refused("is a share of the peak; write 40 % as 0.4", text)
    return value


def _size(text: str) -> int:
    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
