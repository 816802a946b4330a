"""The picture of the flow in method.md, after `make quickstart`: `python docs/flow_picture.py`.

One photograph's tokens on their way from noise to data, at four K, by the package's own functions.
A token is a square of the grid; its colour is three directions of its 16 channels.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from lgm_scale.evaluation.report.drawing import LIGHT, to_png
from lgm_scale.evaluation.report.pictures import image_grid
from lgm_scale.families.lgm.pipeline import LGMPipeline
from lgm_scale.flow import NoiseScale, interpolate, merged_noise
from lgm_scale.randomness import Purpose, stream_keys

RUN = Path("runs/quickstart")
TIMES, LENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0), (64, 32, 16, 8)
OUT = Path(__file__).parent / "images" / "flow.png"


def main() -> None:
    """Draw it."""
    pipe = LGMPipeline.from_bundle(RUN / "dit" / "bundle", device="cpu")
    photograph = Image.open(RUN / "data" / "photos" / "val" / "coffee" / "00003.jpg")
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        z = (pipe.tokenizer.encode(pixels) - pipe.bundle.stats.mean) / pipe.bundle.stats.std
    directions = torch.linalg.svd(z[0] - z[0].mean(0), full_matrices=False).Vh[:3].T  # [D, 3]
    keys = stream_keys(0, Purpose.NOISE, 0, torch.tensor([0]))
    rows = []
    for num_tokens in LENGTHS:
        cut = pipe.tree.assignment(num_tokens)
        noise = merged_noise(keys, cut, z.shape[-1], NoiseScale.CORRECTED)
        states = [cut.unmerge(interpolate(cut.merge(z), noise, torch.tensor([t]))) for t in TIMES]
        colours = torch.cat(states) @ directions / 6 + 0.5  # [times, N, 3]
        side = round(colours.shape[1] ** 0.5)
        tiles = (colours.clamp(0, 1) * 255).byte().view(len(TIMES), side, side, 3)
        rows.append(tiles.permute(0, 3, 1, 2).numpy())
    names = ["t = 0, noise", *(f"t = {t:g}" for t in TIMES[1:-1]), "t = 1, data"]
    OUT.write_bytes(to_png(image_grid(rows, [f"K = {k}" for k in LENGTHS], names, LIGHT), LIGHT))


if __name__ == "__main__":
    main()
