"""A run that starts from a bundle's weights (`init_from`): trained, resumed, refused, planned."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from far_storage import FarStorage
from release_files import generator_content, shuffle
from safetensors.torch import load_file
from small_pipeline import SmallPipeline, losses, train_in_process
from torch import nn
from typed_commands import refusal, typed

from lgm_scale.build import take_initial_weights
from lgm_scale.checkpoint.run_folder import RunFolder
from lgm_scale.config.inputs import input_problems
from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import CheckpointError
from lgm_scale.families.elit.bundle import load_elit_bundle, save_elit_bundle
from lgm_scale.families.elit.config import ELITModelConfig, SpaceConfig
from lgm_scale.families.elit.network import build_elit
from lgm_scale.families.elit.training import ELITTrainingModel
from lgm_scale.families.lgm.bundle import load_lgm_bundle, save_lgm_bundle
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.latent_stats import STATS_NAME, LatentStats
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.families.lgm.release import Surroundings, import_generator
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.families.tokenizer.bundle import load_tokenizer
from lgm_scale.families.tokenizer.training import TokenizerTrainingModel
from lgm_scale.train import main
from lgm_scale.training.model import TrainingModel

SHORT = {"max_duration": "2ba", "global_batch_size": 8, "precision": "fp32"}
SIZES = {"size": "tiny", "latent_dim": 8, "num_base_tokens": 16}
STILL = {"lr": 1e-12}
"""A learning rate at which weights stay what they were."""


def class_names(pipeline: SmallPipeline) -> tuple[str, ...]:
    return tuple(json.loads((pipeline.latents / "manifest.json").read_text())["classes"])


def random_net(net: nn.Module) -> nn.Module:
    shuffle(net, 5)
    return net


def generator_bundle(pipeline: SmallPipeline, folder: Path, classes: tuple[str, ...]) -> Path:
    """Random weights that know these classes, on the small tokenizer and its latents."""
    model = LGMModelConfig(num_classes=len(classes), **SIZES)
    weights = random_net(build_merge_dit(model)).state_dict()
    stats = LatentStats.load(pipeline.latents / STATS_NAME)
    training = {
        "steps": 70,
        "weights": "ema",
        "config": {"objective": {"noise_scale": "corrected"}},
    }
    save_lgm_bundle(folder, model, weights, stats, classes, pipeline.tokenizer, training)
    return folder


def tuned(pipeline: SmallPipeline, out: Path, bundle: Path, **changes: object) -> Path:
    values = {"run_name": "tuned", "train": SHORT, "init_from": str(bundle)}
    return pipeline.generator_config(out, **(values | changes))


def first_batch(path: Path) -> tuple[Path, dict]:
    """Train a configuration; its folder, and the batch of its first step."""
    batches = []
    out = train_in_process(path, on_step=lambda step, batch: batches.append(copy.copy(batch)))
    return out, batches[0]


def loss_of(model: TrainingModel, batch: dict) -> float:
    model.net.requires_grad_(True)  # a bundle's are frozen, and losses may ask for gradients
    return float(model.loss(model(batch), batch).detach())


def weights_of(out: Path, name: str = "generator") -> dict[str, torch.Tensor]:
    return load_file(out / "bundle" / f"{name}.safetensors")


def start_of(out: Path) -> dict:
    (entry,) = [e for e in json.loads((out / "history.json").read_text()) if "init_from" in e]
    return entry


@pytest.fixture(scope="module")
def trained(small_pipeline, tmp_path_factory) -> Path:
    """A generator's bundle with the classes of the data."""
    folder = tmp_path_factory.mktemp("trained") / "bundle"
    return generator_bundle(small_pipeline, folder, class_names(small_pipeline))


# --- what is taken --------------------------------------------------------------------------------


def test_the_first_loss_of_a_generator_is_that_of_the_bundle(small_pipeline, trained, tmp_path):
    path = tuned(small_pipeline, tmp_path / "run", trained, optimizer=STILL)
    out, batch = first_batch(path)
    bundle = load_lgm_bundle(trained)
    config = load_training_run(str(path), [], 1, has_gpu=False)
    model = LGMTrainingModel(bundle.net, bundle.tree, bundle.stats, config.objective, 0)
    assert losses(out, 2)[0] == loss_of(model, batch)
    wanted = load_file(trained / "generator.safetensors")
    for name, value in weights_of(out).items():  # so the average starts there as well
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-9)
    start = start_of(out)
    assert start["taken"] == [
        f"{trained}: averaged weights (EMA) after 70 steps; optimizer, step, schedule and "
        "average start new",
        "labels: all 17 rows and the null row are kept, by name",
    ]
    training = json.loads((out / "bundle" / "bundle.json").read_text())["training"]
    assert training["start"] == start
    assert start["files"]["generator.safetensors"] == file_hash_in(trained)
    assert training["config"]["init_from"] == str(trained)


def file_hash_in(bundle: Path) -> str:
    return json.loads((bundle / "bundle.json").read_text())["files"]["generator.safetensors"]


def test_the_first_loss_of_a_tokenizer_is_that_of_the_bundle(small_pipeline, tmp_path):
    path = small_pipeline.tokenizer_config(
        tmp_path / "run", train=SHORT, init_from=str(small_pipeline.tokenizer), optimizer=STILL
    )
    out, batch = first_batch(path)
    config = load_training_run(str(path), [], 1, has_gpu=False)
    model = TokenizerTrainingModel(load_tokenizer(small_pipeline.tokenizer), config.objective, 0)
    assert losses(out, 2)[0] == loss_of(model, batch)


def test_the_first_loss_of_a_sit_is_that_of_the_bundle(small_pipeline, tmp_path):
    space = SpaceConfig(kind="pixels", image_size=32)
    model = ELITModelConfig(size="tiny", patch_size=4, num_classes=17)
    weights = random_net(build_elit(model, space)).state_dict()
    names = class_names(small_pipeline)
    save_elit_bundle(tmp_path / "bundle", model, space, weights, names, {"weights": "ema"})
    path = small_pipeline.elit_config(
        tmp_path / "run", train=SHORT, init_from=str(tmp_path / "bundle"),
        model={"size": "tiny", "patch_size": 4, "num_classes": 17}, lengths={"choices": [64]},
    )  # fmt: skip
    out, batch = first_batch(path)
    net = load_elit_bundle(tmp_path / "bundle").net
    config = load_training_run(str(path), [], 1, has_gpu=False)
    assert losses(out, 2)[0] == loss_of(ELITTrainingModel(net, None, config.objective, 0), batch)


def test_other_classes_keep_the_rows_of_equal_names(small_pipeline, tmp_path):
    names = class_names(small_pipeline)
    known = ("unicorn", *reversed(names[:5]), "dragon")
    bundle = generator_bundle(small_pipeline, tmp_path / "bundle", known)
    path = tuned(small_pipeline, tmp_path / "run", bundle, optimizer=STILL)
    out = train_in_process(path)
    table, old = (
        load_file(folder / "generator.safetensors")["label_embed.table.weight"]
        for folder in (out / "bundle", bundle)
    )
    torch.testing.assert_close(table[:5], old[1:6].flip(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(table[-1], old[-1], rtol=0, atol=1e-9)
    assert not any((row == other).all() for row in table[5:-1] for other in old)
    said = f"labels: 5 of 17 rows are kept, by name; new: {', '.join(names[5:9])}, ...; 2 of the "
    assert start_of(out)["taken"][1] == said + "bundle are left out; the null row is kept"


def test_a_checkpoint_of_the_authors_starts_a_run_with_own_classes(small_pipeline, tmp_path):
    net = random_net(build_merge_dit(LGMModelConfig(num_classes=4, **SIZES)))
    torch.save(generator_content(net), tmp_path / "xl.pth")
    stats = {"mean": torch.full((1, 1, 8), 0.5), "std": torch.full((1, 1, 8), 2.0)}
    torch.save(stats, tmp_path / "stats.pt")
    around = Surroundings(small_pipeline.tokenizer, tmp_path / "stats.pt", noise_scale="legacy")
    import_generator(tmp_path / "xl.pth", tmp_path / "bundle", around)
    out = train_in_process(tuned(small_pipeline, tmp_path / "run", tmp_path / "bundle"))
    assert len(losses(out, 2)) == 2
    origin, labels, noise, latents = start_of(out)["taken"]
    assert "averaged weights (EMA), imported from xl.pth" in origin
    assert "labels: all 17 rows start new, for no class here" in labels
    assert "noise: objective.noise_scale is corrected here and was legacy" in noise
    assert "latents: standardised by this data's own statistics, means up to" in latents
    weights = load_file(tmp_path / "bundle" / "generator.safetensors")
    for name, value in weights.items():
        assert torch.equal(value, net.state_dict()[name]), name


# --- resuming -------------------------------------------------------------------------------------


def test_a_resume_reads_no_bundle_and_the_key_cannot_change(small_pipeline, trained, tmp_path):
    four = SHORT | {"max_duration": "4ba"}
    bundle = Path(shutil.copytree(trained, tmp_path / "bundle"))
    whole = train_in_process(tuned(small_pipeline, tmp_path / "whole", bundle, train=four))
    path = tuned(small_pipeline, tmp_path / "run", bundle, train=SHORT)
    assert typed(main, path).status == 0
    shutil.rmtree(bundle)
    longer = "train.max_duration=4ba"
    assert "4 steps done" in typed(main, path, longer).out
    assert losses(tmp_path / "run", 4) == losses(whole, 4)
    assert start_of(tmp_path / "run")["taken"] == start_of(whole)["taken"]
    assert "is finished" in typed(main, path, longer).out
    said = refusal(main, path, longer, f"init_from={trained}")
    assert f"init_from: '{bundle}' there, '{trained}' here" in said
    assert "its states do not read a bundle again: leave the key as it was" in said
    said = refusal(main, path, longer, "init_from=null", "--allow-change", "init_from")
    assert "--allow-change init_from: it cannot change within a run" in said
    fresh = tuned(small_pipeline, tmp_path / "fresh", bundle)
    assert f"init_from: {bundle} is no bundle" in refusal(main, fresh)


def test_another_machine_goes_on_without_the_bundle(small_pipeline, trained, tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(trained, tmp_path / "bundle"))
    bucket = FarStorage(tmp_path / "bucket")
    monkeypatch.setattr("lgm_scale.checkpoint.run.open_storage", lambda *args: bucket)
    common = {"checkpoint": {"interval": "1ba", "folder": "s3://bucket/states"}}
    path = tuned(small_pipeline, tmp_path / "one", bundle, **common)
    assert typed(main, path).status == 0
    shutil.rmtree(bundle)
    path = tuned(small_pipeline, tmp_path / "two", bundle, **common)
    assert "4 steps done" in typed(main, path, "train.max_duration=4ba").out
    assert start_of(tmp_path / "two") == start_of(tmp_path / "one")
    shutil.rmtree(tmp_path / "bucket")
    new = tuned(small_pipeline, tmp_path / "three", bundle, **common)
    assert f"init_from: {bundle} is no bundle" in refusal(main, new)


def test_a_bundle_that_an_earlier_job_makes_is_not_looked_for(small_pipeline, tmp_path):
    path = tuned(small_pipeline, tmp_path / "run", tmp_path / "bundle")
    config = load_training_run(str(path), [], 1, has_gpu=False)
    folder = RunFolder(tmp_path / "run", config)
    assert folder.start_problems(lambda path: path == str(tmp_path / "bundle")) == []
    assert "no bundle" in "".join(folder.start_problems())


def test_a_run_from_before_the_key_goes_on(small_pipeline, trained, tmp_path):
    path = small_pipeline.generator_config(tmp_path / "run", train=SHORT)
    out = train_in_process(path)
    assert not (out / "history.json").exists()
    for record in (out / "config.json", out / "state" / "run.json"):
        assert '"init_from": null' in record.read_text()
        lines = record.read_text().splitlines(keepends=True)
        record.write_text("".join(line for line in lines if '"init_from"' not in line))
    assert "3 steps done" in typed(main, path, "train.max_duration=3ba").out
    said = refusal(main, path, "train.max_duration=4ba", f"init_from={trained}")
    assert f"init_from: None there, '{trained}' here" in said


def test_a_failed_start_leaves_no_record_to_another_run(small_pipeline, trained, tmp_path):
    path = tuned(small_pipeline, tmp_path / "run", trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lgm_scale.build.build_optimizer", killed)
        with pytest.raises(MemoryError):
            typed(main, path)
    assert start_of(tmp_path / "run")["init_from"] == str(trained)
    assert typed(main, path, "init_from=null").status == 0
    assert json.loads((tmp_path / "run" / "history.json").read_text())[:-1] == []


def killed(*args: object) -> None:
    raise MemoryError


# --- what is told before --------------------------------------------------------------------------


def test_a_dry_run_says_what_is_taken(small_pipeline, trained, tmp_path):
    path = tuned(small_pipeline, tmp_path / "run", trained)
    said = typed(main, path, "--dry-run", "model.num_classes=3", "lengths.choices=[4]").out
    assert "init_from    read at the first start alone:\n  " in said
    assert "  labels: 3 classes here, 17 in the bundle; rows of equal names are kept" in said
    said = typed(main, path, "--dry-run", "init_from=later/bundle").out
    assert "later/bundle is not here: what it gives is told at the start" in said
    assert "model.size: b here, tiny in" in refusal(main, path, "--dry-run", "model.size=b")


def test_what_cannot_be_adapted_is_told_with_all_else(small_pipeline, trained, tmp_path):
    path = tuned(small_pipeline, tmp_path / "run", trained)
    said = refusal(
        *(main, path, "model.size=s", "model.latent_dim=16", "optimizer.lr=-1.0"),
    )
    for text in (
        f"model.size: s here, tiny in {trained} (init_from); width, depth and heads cannot be "
        "adapted; set model.size=tiny, or leave init_from out",
        f"(tokenizer={trained}); set model.latent_dim=8, or leave init_from out",
        "optimizer.lr: -1.0 must be above 0",
        "the model wants 16 x 16",
    ):
        assert text in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("init_from={root}/tokenizer", "is a tokenizer bundle; a generator bundle is needed here"),
        ("init_from={root}/images", "init_from: {root}/images is no bundle"),
        ("init_from={root}", "give the `bundle` folder of a run"),
        ("init_from={root}/nowhere", "init_from: {root}/nowhere is no bundle"),
        ("init_from={root}/tokenizer/bundle.json", "lgm_scale.release_import` makes one"),
        ("init_from=s3://bucket/bundle", "is read from a local folder; copy it here"),
        ("lora={{base: {bundle}}}", "an adapter starts from lora.base alone"),
        ("tokenizer={bundle}", None),
    ],
)
def test_a_wrong_bundle_is_one_line(small_pipeline, trained, tmp_path, word, text):
    root = small_pipeline.root
    path = tuned(small_pipeline, tmp_path / "run", trained)
    word = word.format(root=root, bundle=trained)
    if text is None:  # a generator's bundle has its tokenizer in it
        config = load_training_run(str(path), [word], 1, has_gpu=False)
        assert list(input_problems(config)) == []
    else:
        assert text.format(root=root) in refusal(main, path, word, "lengths.choices=[4]")


def test_a_damaged_bundle_is_refused(small_pipeline, trained, tmp_path):
    bundle = Path(shutil.copytree(trained, tmp_path / "bundle"))
    with (bundle / "generator.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    said = refusal(main, tuned(small_pipeline, tmp_path / "run", bundle))
    assert "generator.safetensors is missing or differs from its hash" in said


def test_nodes_with_different_bundles_are_refused(small_pipeline, trained, tmp_path, monkeypatch):
    path = tuned(small_pipeline, tmp_path / "run", trained)
    config = load_training_run(str(path), [], 1, has_gpu=False)
    monkeypatch.setattr("lgm_scale.build.on_rank_zero", lambda decide: {"of another": "bundle"})
    with pytest.raises(CheckpointError, match="is another bundle on rank 0 than on rank 0; put"):
        take_initial_weights(config, None, None, None)  # type: ignore[arg-type]


def test_a_pretrained_encoder_and_a_bundle_exclude_each_other(small_pipeline, tmp_path):
    path = small_pipeline.tokenizer_config(tmp_path / "run")
    bundle = f"init_from={small_pipeline.tokenizer}"
    said = refusal(main, path, bundle, "model.pretrained_encoder=hub", "model.size=b")
    assert "model.pretrained_encoder: hub; the encoder starts from the bundle" in said
    assert "model.size: b here, tiny in" in said
    words = ("model.codebook_size=16", "model.num_codebooks=2", "model.patch_size=4")
    words += ("model.quantizer=none", "objective.entropy=0")
    said = refusal(main, path, bundle, *words, "model.latent_dim=4")
    there = {"quantizer": "soft", "codebook_size": 32, "num_codebooks": 4, "patch_size": 8}
    for name, value in there.items():
        assert f"set model.{name}={value}, or leave init_from out" in said
