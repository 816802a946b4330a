"""Options of the commands that import the release's generators. Free of torch."""

from __future__ import annotations

from typing import Any

from lgm_scale.families.base import Tool
from lgm_scale.release_import import CLASSES_HELP

RELEASED_ALPHA = 32.0


def _surroundings(noise_scale: str) -> dict[str, dict[str, Any]]:
    """Options for what the checkpoint does not say, with a default noise scale."""
    return {
        "--tokenizer": {"metavar": "BUNDLE", "help": "of the tokenizer that made the latents"},
        "--latent-stats": {
            "metavar": "FILE",
            "help": "mean and std of the latents it was trained on: the release's "
            "latents_stats.pt, or latent_stats.safetensors of a folder of latents encoded here",
        },
        "--merge-tree": {
            "metavar": "FILE",
            "help": "the release's merge dictionary; default: the tokenizer's own tree",
        },
        "--classes": {"metavar": "FILE", "help": CLASSES_HELP},
        "--noise-scale": {
            "choices": ["corrected", "legacy"],
            "default": noise_scale,
            "help": "how it was trained to see noise; the checkpoint does not say "
            "(default %(default)s)",
        },
    }


_NEEDED = {
    "--tokenizer": "give the bundle of the tokenizer's import",
    "--latent-stats": "images cannot be decoded without the mean and std that the generator's "
    "latents were standardised with. Give the release's latents_stats.pt, or encode images with "
    "this tokenizer (data_tools/encode_latents.py) and give latent_stats.safetensors of that "
    "folder",
}
IMPORTERS = {
    "generator": Tool(
        "lgm_scale.families.lgm.release:run_import",
        "a checkpoint {model, model_ema}",
        options=_surroundings("corrected"),
        needed=_NEEDED,
    ),
    "lora": Tool(
        "lgm_scale.families.lgm.release_lora:run_import",
        "a checkpoint {model} of a LoRA for one token length",
        options={
            "--num-tokens": {
                "type": int,
                "required": True,
                "metavar": "K",
                "help": "length it was trained at",
            },
            "--alpha": {
                "type": float,
                "default": RELEASED_ALPHA,
                "help": "default %(default)g, as released",
            },
            "--base": {
                "metavar": "BUNDLE",
                "help": "add the adapter to this import of another length",
            },
            **_surroundings("legacy"),
        },
        needed=_NEEDED,
        instead={"--base": ("--tokenizer", "--latent-stats", "--merge-tree", "--classes")},
    ),
}
