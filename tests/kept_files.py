"""Reading the kept files (tests/golden/kept): commands, digests, and whether bits can be compared.

Imports nothing of this project: what is kept is read through commands and files alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forked_commands import run_forked
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "golden" / "kept"

GENERATORS = {
    "lgm": ([4, 9], ["cat_one", "dog", "eel"]),
    "lora": ([8, 16], ["cat_one", "dog", "eel"]),
    "elit": ([4, 12], ["cat_one", "dog", "eel"]),
    "sit": ([16], ["cat_one", "dog", "eel"]),
}
"""Bundle -> lengths and classes whose images are kept. `lora` has an adapter at 8, none at 16."""
RECONSTRUCTED = [4, 9, 16]
STATES = {
    "ddp": ([], 2),
    "fsdp1": (["parallel.fsdp.version=1"], 2),
    "fsdp2": ([], 2),
    "zero2": ([], 2),
    "zero3": ([], 2),
    "tokenizer": ([], 1),
    "elit": ([], 1),
}
"""Run -> what was overridden when it was begun, and not when it goes on; ranks."""
STEPS, STATE_STEP = 12, 4
SWEEPS = ("lgm", "elit")


def run_at(
    folder: Path, *args: str | Path, ranks: int = 0, timeout: float = 800, fresh: bool = False
) -> subprocess.CompletedProcess:
    """A command of this checkout, with paths relative to `folder`; it must succeed.

    In processes that have imported everything, or (`fresh`) in new interpreters.
    """
    if fresh:
        result = subprocess.run(
            command(*args, ranks=ranks),
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    else:
        result = run_forked(_placed(args), folder, ranks=ranks, timeout=timeout)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result


def command(*args: str | Path, ranks: int = 0) -> list[str]:
    """Scripts by their path in the checkout; `-m` stays; ranks under composer's launcher."""
    launcher = [str(Path(sys.executable).with_name("composer")), "-n", str(ranks)]
    return [*(launcher if ranks else [sys.executable]), *_placed(args)]


def _placed(args: Sequence[str | Path]) -> list[str]:
    script = str(ROOT / args[0]) if str(args[0]).endswith(".py") else str(args[0])
    return [script, *map(str, args[1:])]


def environment() -> dict[str, str]:
    """One thread per process, and this checkout before an installed one."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def unpack(name: str, folder: Path) -> None:
    """Unpack one of the kept archives."""
    with zipfile.ZipFile(KEPT / f"{name}.zip") as archive:
        archive.extractall(folder)


def read_expected() -> dict[str, Any]:
    return json.loads((KEPT / "expected.json").read_text())


# --- what a run left --------------------------------------------------------------------------


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def final_weights(out: Path) -> dict[str, Tensor]:
    """Of the network that a finished run trained."""
    generator = out / "bundle" / "generator.safetensors"
    return load_file(generator if generator.exists() else out / "bundle" / "tokenizer.safetensors")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def some_values(tensors: Mapping[str, Tensor], count: int = 4) -> dict[str, list[float]]:
    """Values of each tensor, evenly spread: for machines that compute other bits."""
    found = {}
    for name in sorted(tensors):
        flat = tensors[name].flatten().double()
        places = torch.linspace(0, len(flat) - 1, min(count, len(flat))).long()
        found[name] = flat[places].tolist()
    return found


def metrics_of(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of a sweep or a reconstruction by row, without times."""
    rows = [row for key in ("rows", "searched", "reconstructions") for row in results.get(key, [])]
    return {
        f"{row['kind']} {row.get('label', row.get('num_tokens'))}": row["metrics"] for row in rows
    }


def content_of(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- whether this machine computes the bits that were kept -----------------------------------


def compares_bits() -> bool:
    """Whether numbers must be the kept ones to the last bit; LGM_KEPT_EXACT=1 insists."""
    return os.environ.get("LGM_KEPT_EXACT") == "1" or arithmetic() == read_expected()["arithmetic"]


def arithmetic() -> str:
    """A digest of what this machine makes of a fixed computation on one thread.

    Two machines with equal digests run the same kernels, and a run gives the same bits on both.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return digest(_computation())
    finally:
        torch.set_num_threads(threads)


def _computation() -> dict[str, Tensor]:
    def values(*shape: int) -> Tensor:
        flat = np.modf(np.arange(1, math.prod(shape) + 1) * 0.6180339887498949)[0] - 0.5
        return torch.tensor(flat, dtype=torch.float32).view(shape)

    found: dict[str, Tensor] = {}
    x = values(6, 16, 128)
    for width in (96, 128, 384, 682, 768):
        weight = (values(width, 128) * 0.2).requires_grad_()
        y = functional.linear(x, weight)
        y = functional.layer_norm(functional.silu(y) + functional.gelu(y), (width,))
        loss = (y.softmax(-1) * y).square().mean() + y.exp().mean().log()
        (gradient,) = torch.autograd.grad(loss, weight)
        moment = gradient.square().sqrt().add(1e-8)
        found |= {f"{width}.y": y.detach(), f"{width}.step": weight.detach() - gradient / moment}
    for length in (4, 9, 16):
        q = values(6, 4, length, 32) * 3
        found[f"attention.{length}"] = functional.scaled_dot_product_attention(q, q.flip(2), q)
    image = values(3, 3, 16, 16)
    found["patches"] = functional.conv2d(image, values(96, 3, 4, 4), stride=4)
    found["randn"] = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found["waves"] = torch.cat([x.sin().flatten(), x.cos().flatten(), (x * 9).tanh().flatten()])
    found["spectrum"] = torch.linalg.eigvalsh((x[0].T @ x[0]).double())
    return found
