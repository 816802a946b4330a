"""Fixtures of the unit tests: the golden numbers, and the merges they were made with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.release import our_generator_name
from lgm_scale.merging.tree import MergeAssignment

GOLDEN_DIR = Path(__file__).resolve().parents[1] / "golden"

GoldenLoader = Callable[[str], dict[str, torch.Tensor]]


@cache
def _load(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN_DIR / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN_DIR


@pytest.fixture(scope="session")
def golden() -> GoldenLoader:
    """`golden("dit_tiny_io")`: all tensors of one golden file. Fresh copies, safe to write to."""
    return lambda name: {key: value.clone() for key, value in _load(name).items()}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small sweep reads: bundles, validation images and a metrics log; not to be changed."""
    from small_sweep import make_sweep_inputs

    return make_sweep_inputs(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small autoencoder with random weights; not to be changed."""
    from small_vae import save_small_vae

    return save_small_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bundles `tokenizer`, `dit` and `elit`, of random weights; not to be changed."""
    from small_elit import make_elit_bundle
    from small_sweep import make_bundles

    folder = tmp_path_factory.mktemp("bundles")
    make_bundles(folder, {"config": {"objective": {"noise_scale": "corrected"}}})
    make_elit_bundle(folder / "elit")
    return folder


@pytest.fixture(scope="session")
def golden_cut(golden: GoldenLoader) -> Callable[[int], tuple[MergeAssignment, torch.Tensor]]:
    """`golden_cut(K)`: the assignment of the golden DiT numbers, and where its clusters are there.

    The release numbers clusters arbitrarily, we by smallest member: our cluster j is the golden
    cluster order[j], so `golden_tensor[:, order]` is in our order. K = 256 merges nothing.
    """

    def cut(num_tokens: int) -> tuple[MergeAssignment, torch.Tensor]:
        labels = torch.arange(256)
        if num_tokens < 256:
            labels = golden("merge_assignments")[f"n256.k{num_tokens}.labels"]
        assignment = MergeAssignment.from_labels(labels)
        order = torch.empty(num_tokens, dtype=torch.int64)
        order[assignment.labels] = labels
        return assignment, order

    return cut


@pytest.fixture(scope="session")
def our_dit_name() -> Callable[[str], str]:
    """From the release's name of a parameter of the diffusion transformer to ours."""
    return our_generator_name


@pytest.fixture
def golden_dit(golden: GoldenLoader, our_dit_name: Callable[[str], str]) -> MergeDiT:
    """The golden network, fresh for each test. Noise replaces the weights that start at zero."""
    net = MergeDiT(
        width=64, depth=2, num_heads=4, latent_dim=8, num_base_tokens=256, num_classes=10
    )
    state = golden("dit_tiny_state")
    net.load_state_dict({our_dit_name(name): value for name, value in state.items()})
    return net
