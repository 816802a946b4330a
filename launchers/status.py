"""How a run is: state, nodes, step, speed, loss, time left, restarts and why, last lines.

    python launchers/status.py runs/dit_xl
    watch -n 30 python launchers/status.py runs/dit_xl

RUN is the folder that a job writes (its `out`). From files and, where it is installed, from
Slurm's accounting; it works as well when the job has ended, and for a run that another launcher
started. Exit status: 0 shown, 2 for a folder that holds no run.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lgm_scale  # noqa: F401  # says so where Python is a wrong one
from launchers import scheduler
from launchers.records import LAUNCH_NAME, Start, Starts, last_speed, launch_folders, rank_log, tail
from lgm_scale.errors import ConfigError, exit_on_user_error

_STATE = re.compile(r"ba(\d+)-a(\d+)")
_WINDOW = 50  # steps over which a loss is averaged


def main() -> int:
    """Print it."""
    parser = argparse.ArgumentParser(
        prog="python launchers/status.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, such as runs/x")
    parser.add_argument("--lines", type=int, default=8, metavar="N", help="of the log (8)")
    args = parser.parse_args()
    if args.lines < 1:
        raise ConfigError(f"--lines: {args.lines} must be 1 or more")
    print("\n".join(status(args.run, args.lines)))
    return 0


def status(run: Path, lines: int = 8) -> list[str]:
    """The lines to show. Raises: ConfigError if there is no run."""
    root = next(
        (path for path in (run / "slurm", run.with_name(run.name + ".slurm")) if path.is_dir()),
        run / "slurm",
    )
    launches = launch_folders(root)
    if not launches and not (run / "config.json").is_file():
        raise ConfigError(f"RUN: {run} holds no run: neither config.json nor a launch is there")
    told = [f"run        {run}"]
    if launches:
        told += _launch(launches[-1], len(launches))
    told += _training(run, root)
    if launches:
        told += _log(launches[-1], lines)
    return told


def _launch(folder: Path, count: int) -> list[str]:
    """State of the last launch's jobs, their nodes and restarts."""
    launch = json.loads((folder / LAUNCH_NAME).read_text())
    times = f", launch {count}" if count > 1 else ""
    told = [f"job        {launch['kind']} {launch['name']}: {launch['ranks']} ranks{times}"]
    for job_id in launch["job_ids"]:
        starts = Starts(folder / job_id).read()
        try:
            stretches = scheduler.accounting(job_id)
            live = scheduler.live_jobs(job_id)
            last = live[-1:] or stretches[-1:]
            known = f"{last[0].state}, {last[0].nodes}" if last else "unknown to Slurm"
        except scheduler.SlurmError as error:
            stretches, verdict = [], starts[-1].verdict if starts else None
            known = f"{verdict.outcome if verdict else 'started'} (from records: {error})"
        told.append(f"state      {known}, job {job_id}")
        restarts = [start for start in starts if start.restart > 0]
        told.append(f"restarts   {len(restarts)}")
        told += [_start(start, stretches) for start in starts]
    return told


def _start(start: Start, stretches: list[scheduler.Accounted]) -> str:
    """One start: when, where, and what came of it."""
    verdict = start.verdict
    if verdict is not None:
        at = f" at step {verdict.step}" if verdict.step is not None else ""
        what = f"{verdict.outcome}{at}: {verdict.reason}"
    elif start.restart < len(stretches) - 1:  # it left no record, Slurm started it again
        what = f"ended by Slurm: {stretches[start.restart].state}"
    elif stretches:
        what = stretches[-1].state.lower()
    else:
        what = "no end recorded"
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(start.time)) if start.time else "?"
    return f"  {start.restart:3d}  {when}  {','.join(start.nodes)}  {what}"


def _training(run: Path, root: Path) -> list[str]:
    """Step, speed, loss, time left, resume state; nothing for a job without steps."""
    try:
        config = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        return []
    rows = _rows(run / "metrics.jsonl")
    step, total = (rows[-1]["step"] + 1 if rows else 0), _total_steps(config)
    share = f" of {total:,} ({step / total:.1%})" if total else ""
    told = [f"step       {step:,}{share}"]
    speed, batch = last_speed(root), config["train"]["global_batch_size"]
    if speed:
        told.append(f"speed      {speed:.3g} steps/s, {speed * batch:,.0f} images/s")
    if rows:
        losses: dict[Any, list[float]] = {}
        for row in rows[-_WINDOW:]:
            losses.setdefault(row["num_tokens"], []).append(row["loss"])
        means = "  ".join(
            f"K={k}: {sum(values) / len(values):.4f}"
            for k, values in sorted(losses.items(), key=lambda item: str(item[0]).zfill(9))
        )
        told.append(f"loss       {means}  (mean of the last {min(_WINDOW, len(rows))} steps)")
    if (run / "bundle" / "bundle.json").is_file():
        told.append(f"result     {run / 'bundle'}: finished")
    elif speed and total and step < total:
        left = (total - step) / speed
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left))
        told.append(f"time left  {_duration(left)} of computing, not before {end}")
    state = Path(config["checkpoint"]["folder"] or run / "state")
    if not launch_folders(root):
        told += _other_launcher(state / "attempts")
    return told + _resume_state(state)


def _other_launcher(folder: Path) -> list[str]:
    """Starts of a run that Slurm's launcher knows nothing of, as the trainer notes them."""
    starts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    told = [f"restarts   {len(starts) - 1}"] if starts else []
    for start in starts:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(start["started"]))
        began = f"from step {start['resumed_step']}"
        told.append(f"  {start['number'] - 1:3d}  {when}  {start['host']}  {began}")
    return told


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in tail(path)[-10 * _WINDOW :]:
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill, or cut by `tail`
            continue
        if isinstance(row, dict) and {"step", "num_tokens", "loss"} <= row.keys():
            rows.append(row)
    return rows


def _total_steps(config: dict[str, Any]) -> int | None:
    match = re.fullmatch(r"(\d+)(ep|ba)", config["train"]["max_duration"])
    if match is None:
        return None
    if match[2] == "ba":
        return int(match[1])
    samples = config["data"]["num_samples"]
    scaled = config["train"].get("batch_scaling", "constant_samples") != "constant_samples"
    if samples is None or scaled:  # the steps of an epoch depend on its lengths
        return None
    return int(match[1]) * (samples // config["train"]["global_batch_size"])


def _resume_state(folder: Path) -> list[str]:
    """The newest complete state."""
    if "://" in str(folder) or ":/" in str(folder):
        return [f"saved      in {folder} (object storage; not looked at)"]
    states = [
        (int(match[1]), path)
        for path in folder.glob("ba*")
        if (match := _STATE.fullmatch(path.name)) and (path / "manifest.json").is_file()
    ]
    if not states:
        return ["saved      no resume state yet"]
    step, path = max(states)
    age = time.time() - (path / "manifest.json").stat().st_mtime
    return [f"saved      step {step:,}, {_duration(age)} ago: {path}"]


def _log(folder: Path, lines: int) -> list[str]:
    launch = json.loads((folder / LAUNCH_NAME).read_text())
    log = rank_log(folder, launch["job_ids"][0])
    last = [line for line in tail(log) if line.strip()][-lines:] if lines > 0 else []
    return [f"log        {log}", *(f"  | {line[:200]}" for line in last)]


def _duration(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word, like any tool
    exit_on_user_error(main)
