"""A tiny ELIT on pixels with random weights, for tests; and a stand-in for an autoencoder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lgm_scale.families.elit.bundle import save_elit_bundle
from lgm_scale.families.elit.config import ELITModelConfig, InterfaceConfig, SpaceConfig
from lgm_scale.families.elit.network import SiT, build_elit

CLASSES = ("cat_one", "dog", "eel")
PIXELS = SpaceConfig(kind="pixels", image_size=16)
ELIT = ELITModelConfig(
    size="tiny",
    patch_size=4,
    num_classes=len(CLASSES),
    interface=InterfaceConfig(split="declared", group_size=2),
)
"""A grid of 4 x 4 tokens in windows of 2 x 2: K = 4, 8, 12, 16."""
BUDGETS = (4, 8, 12, 16)


def small_network(model: ELITModelConfig = ELIT, space: SpaceConfig = PIXELS) -> SiT:
    """A network whose every weight is random: its outputs would start at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_elit(model, space)
        for parameter in net.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


def make_elit_bundle(
    folder: Path, model: ELITModelConfig = ELIT, classes: tuple[str, ...] = CLASSES
) -> Path:
    """A bundle on pixels."""
    weights = small_network(model).state_dict()
    save_elit_bundle(folder, model, PIXELS, weights, classes, {"steps": 70})
    return folder


class StandInVAE(nn.Module):
    """Answers as the real autoencoder does: eight pixels for each latent, its first channels."""

    scale, channels, downsampling = 0.5, 4, 8

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def decode(self, latents: Tensor) -> Tensor:
        return self.gain * latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    def decode_flops(self, image_size: int) -> int:
        return 1000 * image_size**2


def use_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-in be read and written for the real autoencoder."""
    module: Any = ModuleType("lgm_scale.families.elit.sd_vae")

    def load_sd_vae(folder: str | Path, device: torch.device | str = "cpu") -> StandInVAE:
        return StandInVAE(float((Path(folder) / "weights.txt").read_text())).to(device)

    def save_sd_vae(folder: Path, to: Path) -> None:
        shutil.copytree(folder, to)

    module.load_sd_vae, module.save_sd_vae, module.SDVAE = load_sd_vae, save_sd_vae, StandInVAE
    monkeypatch.setitem(sys.modules, "lgm_scale.families.elit.sd_vae", module)
