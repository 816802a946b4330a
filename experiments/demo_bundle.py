"""Copy a generator's bundle with its weights in half precision, as the package ships one.

    python -m experiments.demo_bundle runs/demo/dit/bundle lgm_scale/demo

Networks read it as any other bundle, and compute in float32. Merge tree and statistics of the
latents stay as they are.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lgm_scale.bundle import read_bundle, start_bundle, write_info
from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.storage.files import file_hash, replace_folder
from lgm_scale.weights import save_weights

NETWORKS = ("generator.safetensors", "tokenizer.safetensors")


def halve(source: Path, target: Path) -> None:
    """Write the copy aside, then in the target's place."""
    info = read_bundle(source, "generator")
    aside = start_bundle(target)
    for name in info["files"]:
        if name in NETWORKS:
            weights = load_file(str(source / name))
            halved = {key: value.to(torch.float16) for key, value in weights.items()}
            save_weights(halved, aside / name)
        else:
            shutil.copyfile(source / name, aside / name)
    info["data"] = "trained on Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT licence"
    info["files"] = {name: file_hash(aside / name) for name in info["files"]}
    write_info(aside, info)
    replace_folder(target, aside)


def main() -> None:
    """Read the command line."""
    if len(sys.argv) != 3:
        raise ConfigError("python -m experiments.demo_bundle BUNDLE OUT: two folders are needed")
    halve(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    exit_on_user_error(main)
