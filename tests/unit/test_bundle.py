from __future__ import annotations

import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from kill_points import KillPoints
from safetensors.torch import load_file

from lgm_scale.bundle import read_bundle
from lgm_scale.errors import CheckpointError
from lgm_scale.families.lgm.bundle import load_lgm_bundle, save_lgm_bundle
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.families.tokenizer.bundle import load_tokenizer, save_tokenizer_bundle, tokenizer_id
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import build_tokenizer

TOKENIZER = TokenizerModelConfig(
    size="tiny", image_size=32, patch_size=8, num_base_tokens=16, latent_dim=8, codebook_size=32
)
GENERATOR = LGMModelConfig(size="tiny", latent_dim=8, num_base_tokens=16, num_classes=2)


@pytest.fixture
def bundles(tmp_path: Path) -> tuple[Path, Path]:
    """A tokenizer bundle and a generator bundle made with it, random weights."""
    torch.manual_seed(0)
    tokenizer, generator = build_tokenizer(TOKENIZER), build_merge_dit(GENERATOR)
    first, second = tmp_path / "tokenizer", tmp_path / "generator"
    tree = tokenizer.merge_tree()
    save_tokenizer_bundle(first, TOKENIZER, tokenizer.state_dict(), tree, {"steps": 3})
    stats = LatentStats(torch.arange(8.0), torch.ones(8))
    weights = generator.state_dict()
    save_lgm_bundle(second, GENERATOR, weights, stats, ("cat", "dog"), first, {"steps": 5})
    return first, second


def test_a_generator_bundle_holds_all_it_needs(bundles):
    first, second = bundles
    expected = load_tokenizer(first)
    shutil.rmtree(first)
    loaded = load_lgm_bundle(second)
    assert loaded.classes == ("cat", "dog")
    assert loaded.stats.mean.tolist() == list(range(8))
    assert loaded.info["training"] == {"steps": 5}
    for name, value in expected.state_dict().items():
        assert torch.equal(value, loaded.tokenizer.state_dict()[name])
    assert torch.equal(loaded.tree.merges, expected.merge_tree().merges)
    assert not any(p.requires_grad for p in loaded.net.parameters())
    assert not loaded.net.training


def test_loading_draws_no_weights_and_leaves_none_undrawn(bundles):
    state = torch.get_rng_state()
    loaded = load_lgm_bundle(bundles[1])
    assert torch.equal(torch.get_rng_state(), state)
    in_files = load_file(bundles[1] / "generator.safetensors")
    assert in_files.keys() == loaded.net.state_dict().keys()
    for name, value in [*loaded.net.named_parameters(), *loaded.net.named_buffers()]:
        assert torch.equal(value, in_files[name]), name


@pytest.mark.parametrize(("routing", "loads"), [(None, True), ({"first": 1, "last": 1}, False)])
def test_a_key_that_is_gone_is_passed_over_where_it_asked_for_nothing(bundles, routing, loads):
    path = bundles[1] / "bundle.json"
    info = json.loads(path.read_text())
    info["models"]["generator"]["routing"] = routing
    path.write_text(json.dumps(info))
    if loads:
        assert load_lgm_bundle(bundles[1]).net is not None
        return
    with pytest.raises(CheckpointError, match="routing: is gone; nested routing did not pay"):
        load_lgm_bundle(bundles[1])


def test_one_tokenizer_has_one_identity(bundles):
    assert tokenizer_id(bundles[0]) == tokenizer_id(bundles[1])


def test_saving_again_gives_the_same_bytes(bundles, tmp_path):
    tokenizer = load_tokenizer(bundles[0])
    again = tmp_path / "again"
    save_tokenizer_bundle(
        again, TOKENIZER, tokenizer.state_dict(), tokenizer.merge_tree(), {"steps": 3}
    )
    for path in bundles[0].iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_a_kill_while_a_bundle_is_replaced_leaves_a_whole_one_or_none(
    bundles, tmp_path, monkeypatch
):
    tokenizer = load_tokenizer(bundles[0])
    weights, tree = tokenizer.state_dict(), tokenizer.merge_tree()
    folder = tmp_path / "run" / "bundle"

    def save(version: int) -> None:
        save_tokenizer_bundle(folder, TOKENIZER, weights, tree, {"version": version})

    def version() -> int | None:
        return read_bundle(folder, "tokenizer")["training"]["version"] if folder.exists() else None

    points, step, found = KillPoints(monkeypatch), 1, []
    save(0)
    while points.run(partial(save, step), step):
        found.append("old" if version() == step - 1 else "new" if version() == step else version())
        save(step)
        assert version() == step
        assert os.listdir(folder.parent) == ["bundle"]
        step += 1
    assert found == ["old"] * found.count("old") + [None, "new"]


def test_no_file_of_a_bundle_is_a_pickle(bundles):
    for path in bundles[1].iterdir():
        assert path.suffix in (".json", ".safetensors")
        with pytest.raises(Exception):  # noqa: B017, PT011  whatever the unpickler says
            pickle.loads(path.read_bytes())


def damage_weights(folder: Path) -> None:
    data = bytearray((folder / "tokenizer.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "tokenizer.safetensors").write_bytes(data)


def edit_info(folder: Path, **changes: object) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (damage_weights, "differs from its hash"),
        (lambda folder: (folder / "merge_tree.safetensors").unlink(), "is missing or differs"),
        (lambda folder: (folder / "bundle.json").unlink(), "is no bundle"),
        (lambda folder: (folder / "bundle.json").write_text("{"), "is damaged"),
        (lambda folder: edit_info(folder, version=2), "reads version 1"),
        (lambda folder: edit_info(folder, kind="generator2"), "a tokenizer bundle is needed"),
        (lambda folder: edit_info(folder, models={}), "configuration is damaged"),
        (
            lambda folder: edit_info(folder, models={"tokenizer": {"size": "s"}}),
            "does not fit its configuration",
        ),
    ],
)
def test_damage_is_named(bundles, damage, text):
    damage(bundles[0])
    with pytest.raises(CheckpointError, match=text):
        load_tokenizer(bundles[0])


def test_kinds_are_not_mixed(bundles):
    with pytest.raises(CheckpointError, match="is a tokenizer bundle; a generator bundle"):
        load_lgm_bundle(bundles[0])
    assert load_tokenizer(bundles[1]).num_base_tokens == 16


def test_a_folder_of_other_things_is_never_replaced(bundles, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("words")
    tokenizer = load_tokenizer(bundles[0])
    with pytest.raises(CheckpointError, match="is no bundle"):
        save_tokenizer_bundle(
            precious, TOKENIZER, tokenizer.state_dict(), tokenizer.merge_tree(), {}
        )
    assert (precious / "thesis.txt").read_text() == "words"
    assert read_bundle(bundles[0], "tokenizer")["kind"] == "tokenizer"
