"""Write the kept files: small bundles, resume states and sweeps, and what they give.

    PYTHONPATH=tests python tests/golden/kept/make_kept.py WORK

WORK is an empty folder. Like the test that reads them back, it uses commands and files only.
README.md says what is special about these files, and why nobody should have to run this again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from kept_files import (
    GENERATORS,
    KEPT,
    RECONSTRUCTED,
    STATE_STEP,
    STATES,
    STEPS,
    SWEEPS,
    arithmetic,
    command,
    digest,
    environment,
    final_weights,
    metrics_of,
    rows_of,
    run_at,
    some_values,
)
from PIL import Image

PERIOD = 127
"""Long tensors repeat their first values with this period, so that archives are small."""
CLASSES = ("cat_one", "dog", "eel")
TRAIN = "lgm_scale/train.py"

COMMON = {
    "ema": {"decay": 0.9},
    "train": {"max_duration": f"{STEPS}ba", "global_batch_size": 8, "precision": "fp32"},
    "checkpoint": {"interval": f"{STATE_STEP}ba"},
    "logging": {"interval": 3, "progress_bar": False},
    "optimizer": {"lr": 1e-3, "clip_norm": 0.5, "schedule": "cosine", "warmup": 3},
}
TOKENIZER = {
    "task": "tokenizer",
    "model": {
        "size": "tiny", "image_size": 16, "patch_size": 4, "num_base_tokens": 16,
        "latent_dim": 4, "num_codebooks": 4, "codebook_size": 8,
    },
    "data": {"path": "data/images", "num_workers": 0},
    "lengths": {"choices": [4, 8, 16], "weights": [2, 2, 1]},
}  # fmt: skip
GENERATOR = {
    "task": "generator",
    "tokenizer": "bundles/tokenizer",
    "model": {"size": "tiny", "latent_dim": 4, "num_base_tokens": 16, "num_classes": 3},
    "data": {"path": "data/latents", "num_workers": 0},
    "lengths": {"choices": [8, 4, 16]},
}
SIT = {
    "task": "spatial_generator",
    "model": {"size": "tiny", "patch_size": 4, "num_classes": 3},
    "space": {"kind": "pixels", "image_size": 16, "flip": True},
    "data": {"path": "data/images", "num_workers": 0},
    "lengths": {"choices": [16]},
}
ELIT = SIT | {
    "model": SIT["model"]
    | {"interface": {"split": "declared", "group_size": 2, "position_rows": 16}},
    "lengths": {"choices": [16, 12, 8, 4], "weights": [1, 1, 1, 2]},
}
LORA = GENERATOR | {
    "lora": {"base": "bundles/lgm", "rank": 2, "alpha": 4.0},
    "lengths": {"choices": [8]},
    "optimizer": {"lr": 1e-2},
}
FSDP = {"parallel": {"strategy": "fsdp"}}
ZERO = {n: {"parallel": {"strategy": "deepspeed", "deepspeed": {"stage": n}}} for n in (2, 3)}
RUNS = {
    "ddp": GENERATOR,
    "fsdp1": GENERATOR | FSDP,
    "fsdp2": GENERATOR | FSDP,
    "zero2": GENERATOR | ZERO[2],
    "zero3": GENERATOR | ZERO[3],
    "tokenizer": TOKENIZER,
    "elit": ELIT,
}


# --- files ------------------------------------------------------------------------------------


def overwrite(path: Path, new_values: Any) -> None:
    """Change values of a safetensors file in place; its header stays as it was written.

    `new_values(name, values)` gives the values of a float32 tensor, flat.
    """
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        first, last = (start + offset for offset in entry["data_offsets"])
        values = np.frombuffer(bytes(content[first:last]), np.float32)
        content[first:last] = np.asarray(new_values(name, values), np.float32).tobytes()
    path.write_bytes(content)


def repeated(values: np.ndarray) -> np.ndarray:
    return np.resize(values[:PERIOD], len(values))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def archive(name: str, folder: Path, *tops: str) -> None:
    """The files below some folders, the same bytes each time."""
    with zipfile.ZipFile(KEPT / f"{name}.zip", "w", zipfile.ZIP_LZMA) as out:
        for top in tops:
            for path in sorted((folder / top).rglob("*")):
                if path.is_file():
                    info = zipfile.ZipInfo(path.relative_to(folder).as_posix())
                    info.compress_type = zipfile.ZIP_LZMA
                    out.writestr(info, path.read_bytes())


def configuration(work: Path, name: str, values: dict[str, Any]) -> str:
    path = work / "runs" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    whole = COMMON | {"run_name": name, "out": f"runs/{name}"} | values
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return f"runs/{name}.yaml"


# --- bundles ----------------------------------------------------------------------------------


def make_images(work: Path) -> None:
    """Three classes of soft patterns, 16 x 16."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (work / "photos" / name).mkdir(parents=True)
        for i in range(8):
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((16, 16), Image.Resampling.BICUBIC).save(
                work / "photos" / name / f"{i}.png"
            )
    convert = "data_tools/images_to_mds.py"
    run_at(work, convert, "photos", "--out", "data/images", "--image-size", "16")


def train_bundle(work: Path, name: str, values: dict[str, Any], *overrides: str) -> Path:
    """A short run's bundle, as bundles/<name>."""
    config = configuration(work, f"bundle-{name}", values)
    run_at(work, TRAIN, config, "train.max_duration=2ba", *overrides)
    (work / "bundles").mkdir(exist_ok=True)
    return shutil.copytree(work / "runs" / f"bundle-{name}" / "bundle", work / "bundles" / name)


def rewrite(bundle: Path, file: str, drawn: float = 0.0, gain: float = 1.0) -> None:
    """Repeat the weights of a bundle's network, and change them so that everything counts.

    Args:
        bundle: Its folder.
        file: The network's.
        drawn: Size of noise that is added: a fresh generator's outputs are zero.
        gain: Of the decoder's blocks: a fresh one hardly looks at the latents.
    """

    def new_values(name: str, values: np.ndarray) -> np.ndarray:
        if name == "merging.embeddings":
            return values  # distances of repeated embeddings would be all alike
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        noise = drawn * np.random.default_rng(seed).standard_normal(PERIOD)
        inner = name.startswith("decoder.vit.blocks") and "norm" not in name
        return (gain if inner else 1.0) * repeated(values) + np.resize(noise, len(values))

    overwrite(bundle / file, new_values)
    info = json.loads((bundle / "bundle.json").read_text())
    info["files"][file] = sha256(bundle / file)
    (bundle / "bundle.json").write_text(json.dumps(info, indent=1) + "\n")


def make_bundles(work: Path) -> None:
    rewrite(train_bundle(work, "tokenizer", TOKENIZER), "tokenizer.safetensors", gain=8.0)
    encode = "data_tools/encode_latents.py"
    places = ("--images", "data/images", "--out", "data/latents")
    run_at(work, encode, "--tokenizer", "bundles/tokenizer", *places)
    for name, values in (("lgm", GENERATOR), ("elit", ELIT), ("sit", SIT)):
        rewrite(train_bundle(work, name, values), "generator.safetensors", drawn=0.08)
    train_bundle(work, "lora", LORA, "train.max_duration=6ba")
    archive("data", work, "data")
    for name in ("tokenizer", *GENERATORS):
        archive(f"bundle_{name}", work, f"bundles/{name}")


def images_of_bundles(work: Path) -> None:
    from lgm_scale import load_pipeline

    torch.set_num_threads(1)
    images = {}
    for name, (lengths, classes) in GENERATORS.items():
        pipe = load_pipeline(work / "bundles" / name)
        for k in lengths:
            images[f"{name}_{k}"] = pipe(classes, num_tokens=k, seed=0, progress_bar=False)
    np.savez_compressed(KEPT / "images.npz", **images)


# --- states -----------------------------------------------------------------------------------


def interrupt(work: Path, name: str) -> None:
    """Begin a run and kill it once its first state is there."""
    begun, ranks = STATES[name]
    config = configuration(work, name, RUNS[name])
    out = work / "runs" / name
    for _ in range(5):
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(
            command(TRAIN, config, *begun, ranks=ranks),
            cwd=work, env=environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        sealed = out / "state" / f"ba{STATE_STEP:08d}-a0001" / "manifest.json"
        while not sealed.exists() and process.poll() is None:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if sealed.exists() and len(list(out.glob("state/ba*/manifest.json"))) == 1:
            break
    else:
        raise RuntimeError(f"{name}: not caught in the middle")
    for scrap in (*out.glob("state/ba*"), *out.glob("state/.partial*")):
        if not (scrap / "manifest.json").exists():
            shutil.rmtree(scrap)
    thin_state(sealed.parent)
    for path in (out / "state" / "attempts").iterdir():
        attempt = json.loads(path.read_text()) | {"host": "kept", "started": 0.0, "scheduler": {}}
        path.write_text(json.dumps(attempt) + "\n")


def thin_state(folder: Path) -> None:
    """Repeat the values of long pieces, and seal the state again."""
    sealed = json.loads((folder / "manifest.json").read_text())
    body = sealed["body"]
    kept = {i for i, (name, _) in enumerate(body["parameters"]) if "merging.embeddings" in name}

    def new_values(name: str, values: np.ndarray) -> np.ndarray:
        kind, _, index = name.partition("/")
        moments = kind in ("exp_avg", "exp_avg_sq")
        whole = kind in ("weight", "ema") and int(index) in kept
        return repeated(values) if moments or (kind in ("weight", "ema") and not whole) else values

    for file in body["files"]:
        overwrite(folder / file["name"], new_values)
        file["sha256"] = sha256(folder / file["name"])
    text = json.dumps(body, separators=(",", ":"))
    total = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(f'{{"sha256": "{total}",\n"body": {text}}}\n')


def resumed(work: Path, name: str) -> dict[str, Any]:
    """What the kept run gives when it goes on; twice, to see whether it is always the same."""
    _, ranks = STATES[name]
    found = []
    for attempt in range(2):
        place = work / f"resumed-{attempt}"
        for top in ("data", "bundles/tokenizer", f"runs/{name}"):
            shutil.copytree(work / top, place / top, dirs_exist_ok=True)
        shutil.copy(work / "runs" / f"{name}.yaml", place / "runs")
        run_at(place, TRAIN, f"runs/{name}.yaml", ranks=ranks)
        out = place / "runs" / name
        weights = final_weights(out)
        found.append(
            {
                "rows": rows_of(out),
                "weights_sha256": digest(weights),
                "weights": some_values(weights),
            }
        )
    assert found[0] == found[1], f"{name} does not repeat its bits"
    return found[0]


# --- sweeps -----------------------------------------------------------------------------------


def make_sweep(work: Path, name: str) -> None:
    lengths = {"lgm": [4, 9], "elit": [4, 12]}[name]
    values = {
        "bundle": f"bundles/{name}",
        "images": "data/images",
        "out": f"sweeps/{name}",
        "cells": [{"num_tokens": lengths}],
        "sampler": {"num_steps": 4, "cfg_scale": 1.5},
        "num_images": 11,
        "batch_size": 3,
        "chunk_size": 6,
        "num_components": 4,
        "metrics": ["pixel_frechet"],
    }
    (work / "sweeps").mkdir(exist_ok=True)
    (work / "sweeps" / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    run_at(work, "eval/sweep.py", f"sweeps/{name}.yaml")
    for drawn in ("*.png", "*.html"):  # the report, drawn again by every start
        for path in (work / "sweeps" / name).glob(drawn):
            path.unlink()
    archive(f"sweep_{name}", work, f"sweeps/{name}")


def reconstruction_numbers(work: Path) -> dict[str, Any]:
    lengths = map(str, RECONSTRUCTED)
    places = ("--bundle", "bundles/tokenizer", "--images", "data/images", "--out", "reconstructed")
    run_at(work, "eval/reconstruct.py", *places, "--lengths", *lengths)
    results = json.loads((work / "reconstructed" / "reconstruction.json").read_text())
    return metrics_of(results)


def main() -> None:
    work = Path(sys.argv[1]).resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_images(work)
    make_bundles(work)
    images_of_bundles(work)
    expected: dict[str, Any] = {"arithmetic": arithmetic(), "resumed": {}}
    expected["reconstruction"] = reconstruction_numbers(work)
    for name in SWEEPS:
        make_sweep(work, name)
    for name in STATES:
        interrupt(work, name)
        archive(f"state_{name}", work, f"runs/{name}")
        expected["resumed"][name] = resumed(work, name)
        print(name, [row["loss"] for row in expected["resumed"][name]["rows"]], flush=True)
    for folder in ("runs", "sweeps"):
        (KEPT / folder).mkdir(exist_ok=True)
    for name in STATES:
        shutil.copy(work / "runs" / f"{name}.yaml", KEPT / "runs")
    for name in SWEEPS:
        shutil.copy(work / "sweeps" / f"{name}.yaml", KEPT / "sweeps")
    (KEPT / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
