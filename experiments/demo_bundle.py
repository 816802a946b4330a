"""Make the generator that the package ships: a swept bundle, its weights in half precision.

    python -m experiments.demo_bundle yamls/demo/long/sweep.yaml lgm_scale/demo

Pipelines read it as any other bundle, and compute in float32. Merge tree and statistics of the
latents stay as they are. The sweep's cells become the settings of calls that name none.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from lgm_scale.bundle import read_bundle, set_sampling_defaults, start_bundle, write_info
from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.sweep.config import expand
from lgm_scale.evaluation.sweep.rules import load_sweep
from lgm_scale.storage.files import file_hash, replace_folder
from lgm_scale.weights import save_weights

NETWORKS = ("generator.safetensors", "tokenizer.safetensors")


def halve(source: Path, target: Path) -> None:
    """Write the copy aside, then in the target's place. Raises: CheckpointError."""
    info = read_bundle(source, "generator")
    aside = start_bundle(target)
    for name in info["files"]:
        if name in NETWORKS:
            weights = load_file(str(source / name))
            save_weights(
                {key: each.to(torch.float16) for key, each in weights.items()}, aside / name
            )
        else:
            shutil.copyfile(source / name, aside / name)
    info["data"] = "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT licence"
    info["files"] = {name: file_hash(aside / name) for name in info["files"]}
    write_info(aside, info)
    replace_folder(target, aside)


def main(argv: list[str] | None = None) -> None:
    """Read the sweep, then copy its bundle."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo_bundle")
    parser.add_argument("sweep", help="YAML of the sweep, whose bundle is copied")
    parser.add_argument("out", type=Path, help="folder of the copy; a bundle there is replaced")
    options = parser.parse_args(argv)
    config = load_sweep(options.sweep, [])
    halve(Path(config.bundle), options.out)
    cells = {cell.num_tokens: cell.sampler.settings() for cell in expand(config)}
    set_sampling_defaults(options.out, cells)


if __name__ == "__main__":
    exit_on_user_error(main)
