"""Names and shapes of the published checkpoints, and the names of ImageNet's classes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.families.lgm.release import config_from_shapes as generator_config
from lgm_scale.families.lgm.release import (
    our_generator_name,
)
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import build_tokenizer
from lgm_scale.families.tokenizer.release import IGNORED, our_tokenizer_name
from lgm_scale.families.tokenizer.release import config_from_shapes as tokenizer_config
from lgm_scale.release_import.names import class_names, fit, translate


def published(golden_dir: Path, name: str) -> dict[str, Tensor]:
    shapes = json.loads((golden_dir / f"lgm_release_{name}_keys.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_every_key_of_the_published_tokenizer_has_its_place(golden_dir):
    state = published(golden_dir, "tokenizer")
    config = tokenizer_config(state, "file")
    assert config == TokenizerModelConfig()  # ViT-B, 256 pixels, 256 tokens of 32 channels
    report = translate(state, our_tokenizer_name, IGNORED)
    with torch.device("meta"):
        ours = {name: value.shape for name, value in build_tokenizer(config).state_dict().items()}
    assert {report.taken[name]: state[name].shape for name in report.taken} == ours
    assert len(report.taken) == len(ours) == 358
    assert set(report.taken) | set(report.ignored) == set(state)
    assert report.counts() == {"used": 4, "renamed": 354, "ignored": 401}
    listed = [line.split()[1].rstrip(":") for line in report.lines()][: len(state)]
    assert set(listed) == set(state)


def test_every_key_of_the_published_generator_has_its_place(golden_dir):
    state = published(golden_dir, "dit_xl")
    config = generator_config(state, 4, "file")
    assert config == LGMModelConfig(size="xl")
    report = translate(state, our_generator_name, {})
    with torch.device("meta"):
        ours = {name: value.shape for name, value in build_merge_dit(config).state_dict().items()}
    assert {report.taken[name]: state[name].shape for name in report.taken} == ours
    assert (len(report.taken), report.ignored) == (405, {})


def test_the_golden_network_goes_through_the_importer(golden, golden_dit):
    state, ours = golden("dit_tiny_state"), golden_dit.state_dict()
    weights = fit(state, translate(state, our_generator_name, {}), ours, "file")
    assert set(weights) == set(ours)
    assert all(torch.equal(weights[name], ours[name]) for name in ours)


def test_layer_scale_tells_the_sizes_apart(golden_dir):
    state = published(golden_dir, "tokenizer")
    bare = {name: value for name, value in state.items() if ".ls1." not in name}
    with pytest.raises(CheckpointError, match="width 768 and 12 blocks, without layer scale"):
        tokenizer_config(bare, "file")


def test_imagenet_names():
    names = class_names("imagenet", 1000)
    assert (names[1], names[207]) == ("goldfish", "golden retriever")
    with pytest.raises(ConfigError, match="imagenet has 1000 names, the generator 3 classes"):
        class_names("imagenet", 3)
    with pytest.raises(ConfigError, match="neither a text file nor"):
        class_names("nowhere.txt", 3)


def test_the_backbone_named_in_args_must_be_the_weights_own(golden_dir):
    from lgm_scale.families.tokenizer.release import check_args

    base = argparse.Namespace(encoder_model="vit_base_patch14_dinov2.lvd142m")
    assert check_args(base, TokenizerModelConfig(), "file") == ["encoder_model"]
    assert check_args(None, TokenizerModelConfig(), "file") == []
    with pytest.raises(CheckpointError, match=r"encoder_model: 'vit_base_.*expected a vit_large"):
        check_args(base, TokenizerModelConfig(size="l"), "file")
