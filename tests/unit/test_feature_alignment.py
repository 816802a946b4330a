"""Alignment with the tokenizer's features: their way to the shards and back, the loss, its end."""

from __future__ import annotations

import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_pipeline import SmallPipeline, Steps, metrics, run_command, train_in_process
from streaming import StreamingDataset
from typed_commands import typed

from lgm_scale.config.rules import load_training_run
from lgm_scale.data.config import SourceConfig
from lgm_scale.data.manifest import read_manifest, write_manifest
from lgm_scale.data.preparation import encode
from lgm_scale.data.preparation.verify import verify
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.families.lgm.config import FeatureAlignmentConfig, LGMObjectiveConfig
from lgm_scale.families.lgm.data import STATS_NAME, LatentStats, LGMLatentDataset
from lgm_scale.families.lgm.feature_alignment import feature_distance
from lgm_scale.families.lgm.features import (
    FEATURES_NAME,
    FeatureSums,
    load_means,
    save_means,
    some_channels,
)
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.families.tokenizer.bundle import load_tokenizer
from lgm_scale.merging.tree import MergeTree
from lgm_scale.parallel.blocks import checkpoint_blocks
from lgm_scale.planning.plan import networks
from lgm_scale.planning.simulation import simulate

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
N, K, D, C = 16, 6, 3, 5
STEPS = 4
WIDTH = 96
"""C of the small pipeline's tokenizer."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- features beside the latents ------------------------------------------------------------------


def encoded(pipeline: SmallPipeline, out: Path, *options: object) -> Path:
    inputs = ("--images", pipeline.images, "--tokenizer", pipeline.tokenizer, "--out", out)
    said = typed(encode.main, *inputs, "--workers", "0", *options)
    assert said.status == 0, said.err
    return out


@pytest.fixture(scope="module")
def featured(small_pipeline) -> Path:
    return encoded(small_pipeline, small_pipeline.root / "featured", "--features")


@pytest.fixture(scope="module")
def stored(featured) -> dict[str, np.ndarray]:
    """Every column: [samples, ...]."""
    reader = StreamingDataset(local=str(featured), batch_size=1, shuffle=False)
    rows = [reader[i] for i in range(len(reader))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def dataset(folders: list[Path], feature_dim: int | None, **changes) -> LGMLatentDataset:
    arguments = {"shuffle": False, "seed": 0, "batch_size": 4, "num_base_tokens": 16}
    arguments |= {"latent_dim": 8, "tokenizer_id": None, "feature_dim": feature_dim}
    sources = [SourceConfig(path=str(folder)) for folder in folders]
    return LGMLatentDataset(sources, **(arguments | changes))


def test_features_are_what_the_encoder_gives_and_latents_stay_as_they_are(
    small_pipeline, featured, stored
):
    plain = StreamingDataset(local=str(small_pipeline.latents), batch_size=1, shuffle=False)
    for name in ("latents", "latents_flipped", "label"):
        expected = np.stack([plain[i][name] for i in range(len(plain))])
        np.testing.assert_array_equal(stored[name], expected)
    tokenizer = load_tokenizer(small_pipeline.tokenizer)
    images = randn(2, 3, 32, 32)
    with torch.no_grad():
        z, features = tokenizer.encode_with_features(images)
        assert torch.equal(z, tokenizer.encode(images))
        assert torch.equal(features, tokenizer.encoder(images))
    assert stored["features"].shape == stored["features_flipped"].shape == (68, 16, WIDTH)
    assert stored["features"].dtype == np.float16
    manifest = read_manifest(featured, "latents")
    assert manifest.extra["feature_dim"] == WIDTH
    assert FEATURES_NAME in manifest.files
    both = np.concatenate((stored["features"], stored["features_flipped"])).astype(np.float64)
    means = load_means([featured], [1]).numpy()
    np.testing.assert_allclose(means, both.mean(0), atol=1e-6)
    statistics = [folder / STATS_NAME for folder in (featured, small_pipeline.latents)]
    assert statistics[0].read_bytes() == statistics[1].read_bytes()
    assert verify(str(featured)).problems == []


def test_fewer_channels_are_a_projection_that_all_ranks_draw_alike(
    small_pipeline, stored, tmp_path
):
    folder = encoded(small_pipeline, tmp_path / "few", "--features", 24)
    reader = StreamingDataset(local=str(folder), batch_size=1, shuffle=False)
    project = some_channels(WIDTH, 24, "cpu")
    basis = project(torch.eye(WIDTH))
    torch.testing.assert_close(basis.T @ basis, torch.eye(24), atol=1e-5, rtol=0)
    whole = torch.from_numpy(stored["features"][5].astype(np.float32))
    few = torch.from_numpy(reader[5]["features"].astype(np.float32))
    torch.testing.assert_close(few, project(whole), atol=1e-2, rtol=1e-2)
    assert read_manifest(folder, "latents").extra["feature_dim"] == 24
    assert torch.equal(some_channels(WIDTH, WIDTH, "cpu")(whole), whole)


@pytest.mark.parametrize("channels", ["-1", "4096"])
def test_channels_that_the_encoder_does_not_have_are_refused(small_pipeline, tmp_path, channels):
    inputs = ("--images", small_pipeline.images, "--tokenizer", small_pipeline.tokenizer)
    said = typed(encode.main, *inputs, "--out", tmp_path / "x", f"--features={channels}")
    assert said.status == 2
    assert f"--features: {channels} channels of the " in said.err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(small_pipeline, tmp_path):
    options = ("--features", "24", "--shard-size", "20000", "--batch-size", "4", "--workers", "0")
    inputs = ("--images", small_pipeline.images, "--tokenizer", small_pipeline.tokenizer)
    for ranks in (1, 2):
        out = ("--out", tmp_path / f"by_{ranks}")
        said = run_command("data_tools/encode_latents.py", *inputs, *out, *options, ranks=ranks)
        assert said.returncode == 0, said.stderr
    files, others = (
        {path.name: path.read_bytes() for path in (tmp_path / f"by_{ranks}").iterdir()}
        for ranks in (1, 2)
    )
    assert files == others
    assert len([name for name in files if name.startswith("shard.")]) > 2


def test_sums_of_parts_are_those_of_the_whole():
    features = randn(7, N, C).half()
    whole, first, second = (FeatureSums(N, C) for _ in range(3))
    whole.add(features)
    first.add(features[:3])
    second.add(features[3:])
    first.merge(second.facts())
    assert torch.equal(first.means(), whole.means())


# --- and back -------------------------------------------------------------------------------------


def test_the_features_of_the_flip_that_is_seen_are_handed_out_on_request_alone(featured, stored):
    asked = dataset([featured], WIDTH, shuffle=True)
    for index in range(0, 68, 7):
        item = asked[index]
        flip = "_flipped" if asked.draw_flip(index) else ""
        for name in ("latents", "features"):
            np.testing.assert_array_equal(item[name].numpy(), stored[f"{name}{flip}"][index])
    plain = dataset([featured], None)
    assert plain[0].keys() == {"latents", "labels", "sample_ids"}
    assert plain.feature_means is None


def test_a_mixture_has_the_mean_features_of_its_samples(featured, tmp_path):
    other = Path(shutil.copytree(featured, tmp_path / "other"))
    means = load_means([featured], [1])
    save_means(means + 1, other / FEATURES_NAME)
    torch.testing.assert_close(load_means([featured, other], [30, 10]), means + 0.25)
    both = dataset([featured, other], WIDTH)
    assert both.epoch_samples == 136
    torch.testing.assert_close(both.feature_means, means + 0.5)


def test_data_without_the_features_are_named_with_the_command_that_makes_them(
    small_pipeline, featured, tmp_path
):
    latents = str(small_pipeline.latents)
    needed = f"{latents} holds latents without features, which objective.feature_alignment needs;"
    with pytest.raises(DataError, match=needed) as told:
        dataset([small_pipeline.latents], 128)
    assert "encode_latents.py --tokenizer BUNDLE --images MDS --out FOLDER --features" in str(
        told.value
    )
    with pytest.raises(DataError, match=r"feature_alignment.channels is 7\. Set it to 96,"):
        dataset([featured], 7)
    with pytest.raises(DataError, match="without features"):
        dataset([featured, small_pipeline.latents], WIDTH)
    copy = Path(shutil.copytree(featured, tmp_path / "copy"))
    manifest = read_manifest(copy, "latents")
    write_manifest(copy, replace(manifest, extra=manifest.extra | {"feature_dim": 3}))
    assert any("the manifest says float16 (16, 3)" in line for line in verify(str(copy)).problems)
    extra = {key: value for key, value in manifest.extra.items() if key != "feature_dim"}
    write_manifest(copy, replace(manifest, extra=extra))
    with pytest.raises(DataError, match="shards have other columns than"):
        dataset([copy], None)


# --- the loss -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(randn(N, 8, seed=3), 2)


def model(tree: MergeTree, alignment: FeatureAlignmentConfig | None) -> LGMTrainingModel:
    objective = LGMObjectiveConfig(feature_alignment=alignment)
    stats = LatentStats(torch.zeros(D), torch.ones(D))
    net, means = MergeDiT(32, 3, 2, D, N, 5), randn(N, C, seed=9)
    with torch.no_grad():  # the zero start would hide everything
        for parameter in net.parameters():
            parameter.copy_(0.15 * randn(*parameter.shape, seed=parameter.numel()))
    torch.manual_seed(1)
    return LGMTrainingModel(net, tree, stats, objective, 0, (K, N), means)


ALIGNED = FeatureAlignmentConfig(steps=STEPS, block=2, channels=C, weight=0.5)


def batch(step: int, num_tokens: int | list[int] = K) -> dict:
    ids = torch.arange(4)
    data = {"latents": randn(4, N, D), "features": randn(4, N, C, seed=4).half()}
    return {**data, "labels": ids, "sample_ids": ids, "step": step, "num_tokens": num_tokens}


def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    found = [p.grad for p in module.parameters()]
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("num_tokens", [K, N])
def test_distance_and_gradient_are_those_of_the_plain_formula(tree, num_tokens):
    cut = tree.assignment(num_tokens)
    found, teacher = randn(2, num_tokens, C).requires_grad_(), randn(2, N, C, seed=1)
    distance = feature_distance(found, teacher, cut)
    (gradient,) = torch.autograd.grad(distance.sum(), found)
    labels = cut.unmerge(torch.arange(num_tokens)[None, :, None])[0, :, 0].tolist()

    def plain(values: torch.Tensor) -> torch.Tensor:
        total = []
        for sample, own in zip(values, teacher.double(), strict=True):
            parts = []
            for token in labels:  # every base token looks at its cluster's mean
                members = [i for i, other in enumerate(labels) if other == token]
                mean = own[members].mean(0)
                parts.append(1 - sample[token] @ mean / (sample[token].norm() * mean.norm()))
            total.append(sum(parts) / N)
        return torch.stack(total)

    values = found.detach().double()
    torch.testing.assert_close(distance.double(), plain(values), atol=1e-6, rtol=1e-5)
    for index in np.ndindex(2, num_tokens, C):
        step = torch.zeros_like(values)
        step[index] = 1e-6
        slope = (plain(values + step) - plain(values - step)).sum() / 2e-6
        assert gradient[index].item() == pytest.approx(slope.item(), abs=1e-5)


@pytest.mark.parametrize("recomputed", [0.0, 1.0])
def test_the_loss_is_the_plain_one_and_the_distance_of_a_block_to_the_merged_teacher(
    tree, recomputed
):
    aligned, plain = model(tree, ALIGNED), model(tree, None)
    seen = []
    aligned.net.blocks[1].register_forward_hook(lambda *args: seen.append(args[2]))
    checkpoint_blocks(list(aligned.net.blocks), recomputed)
    output, same = aligned(batch(0)), plain(batch(0))
    assert torch.equal(output.v_pred, same.v_pred)
    cut = tree.assignment(K)
    teacher = cut.merge(batch(0)["features"].float() - aligned.feature_means)
    found = aligned.feature_layer(seen[0])
    cosine = torch.nn.functional.cosine_similarity(found, teacher, dim=-1)
    expected = ((1 - cosine) * cut.sizes / N).sum(-1)
    torch.testing.assert_close(output.distance, expected)
    loss, before = aligned.loss(output, batch(0)), plain.loss(same, batch(0))
    torch.testing.assert_close(loss, before + 0.5 * expected.mean())
    loss.backward()
    assert all(grad.abs().max() > 0 for grad in gradients(aligned.feature_layer))
    assert torch.equal(aligned.record.latest["feature_alignment"], output.distance.mean())
    assert torch.equal(aligned.record.latest["loss"], before)


@pytest.mark.parametrize("num_tokens", [K, [K, N, N, N]])
def test_after_its_last_step_the_loss_and_every_gradient_are_the_plain_ones_to_the_bit(
    tree, num_tokens
):
    aligned, plain = model(tree, ALIGNED), model(tree, None)
    losses = []
    for each in (aligned, plain):
        inputs = batch(STEPS, num_tokens)
        losses.append(each.loss(each(inputs), inputs))
        losses[-1].backward()
    assert torch.equal(*losses)
    assert all(map(torch.equal, gradients(aligned.net), gradients(plain.net)))
    assert all(grad.abs().max() == 0 for grad in gradients(aligned.feature_layer))
    assert aligned.record.latest.keys() == plain.record.latest.keys() == {"loss"}
    last = batch(STEPS - 1, num_tokens)
    assert aligned.loss(aligned(last), last) > plain.loss(plain(last), last)


def test_samples_of_several_lengths_are_each_compared_at_their_own(tree):
    aligned = model(tree, ALIGNED)
    lengths = [K, K, N, N]
    packed = aligned(batch(0, lengths))
    for output, at in zip(packed, (slice(0, 2), slice(2, 4)), strict=True):
        k = output.assignment.num_tokens
        torch.testing.assert_close(output.distance, aligned(batch(0, k)).distance[at])
    loss = aligned.loss(packed, batch(0, lengths))
    mean = torch.cat([output.distance for output in packed]).mean()
    torch.testing.assert_close(loss, aligned.record.latest["loss"] + 0.5 * mean)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_aligns_until_its_step_resumes_through_it_and_leaves_a_plain_bundle(
    small_pipeline, featured, tmp_path
):
    asked = {"feature_alignment": {"steps": 5, "block": 2, "channels": WIDTH}}

    def config(name: str, objective: dict) -> Path:
        data = {"path": str(featured), "num_workers": 0}
        return small_pipeline.generator_config(
            tmp_path / name, run_name="aligned", data=data, objective=objective
        )

    whole = train_in_process(config("whole", asked))
    with pytest.raises(KeyboardInterrupt):  # states are at 4 and 8
        train_in_process(config("stopped", asked), on_step=Steps(stop=7))
    stopped = train_in_process(config("stopped", asked))
    plain = train_in_process(config("plain", {}))
    rows = metrics(whole)
    assert [row["step"] for row in rows if "feature_alignment" in row] == list(range(5))
    assert [{**row, "wait": 0} for row in metrics(stopped)] == [{**row, "wait": 0} for row in rows]
    bundles = [out / "bundle" / "generator.safetensors" for out in (whole, stopped, plain)]
    assert bundles[0].read_bytes() == bundles[1].read_bytes()
    assert bundles[0].read_bytes() != bundles[2].read_bytes()
    shapes = [{name: value.shape for name, value in load_file(path).items()} for path in bundles]
    assert shapes[0] == shapes[2]
    assert not (whole / "bundle" / FEATURES_NAME).exists()
    names = [path.name for path in (whole / "bundle").iterdir()]
    assert sorted(names) == sorted(path.name for path in (plain / "bundle").iterdir())
    with safe_open(next(iter(sorted((whole / "state").rglob("*.safetensors")))), "pt") as content:
        assert "buffer/feature_means" in content.keys()  # noqa: SIM118
    with pytest.raises(ConfigError, match=r"feature_alignment\.block: 2 there, 1 here"):
        train_in_process(config("whole", asked), "objective.feature_alignment.block=1")


# --- what is refused, and planned -----------------------------------------------------------------

SECTION = "objective.feature_alignment"
ON = [f"{SECTION}.steps=100", f"{SECTION}.block=2", f"{SECTION}.channels=96"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["block=0"], "block: 0 of 4 blocks; name 1 to 4"),
        (["block=5"], "block: 5 of 4 blocks; name 1 to 4"),
        (["steps=0"], "steps: 0 must be 1 or more"),
        (["channels=0"], "channels: 0 must be 1 or more"),
        (["weight=0"], "weight: 0.0 must be above 0"),
    ],
)
def test_numbers_that_are_refused(overrides, message):
    changes = [*ON, *(f"{SECTION}.{change}" for change in overrides)]
    with pytest.raises(ConfigError, match=f"{SECTION}.{message}"):
        load_training_run(str(YAMLS / "experiments/few_steps/plain.yaml"), changes, 1, None)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("experiments/few_steps/mean_flow.yaml", ON, f"{SECTION}: not yet beside"),
        (
            "experiments/few_steps/plain.yaml",
            [*ON, "lora.base=x", "init_from=null", "lengths.choices=[8]"],
            f"{SECTION}: trains a whole generator",
        ),
        ("quickstart/elit.yaml", ON, "feature_alignment: unknown"),
        ("quickstart/tokenizer.yaml", ON, "feature_alignment: unknown"),
    ],
)
def test_runs_that_are_refused(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_training_run(str(YAMLS / recipe), overrides, 1, None)


def test_a_plan_knows_the_layer_and_a_simulated_step_trains_it():
    recipe = str(YAMLS / "experiments/few_steps/plain.yaml")
    plain, aligned = (load_training_run(recipe, changes, 1, None) for changes in ([], ON))
    held = [sum(prod(info.shape) for info in networks(run).infos()) for run in (plain, aligned)]
    assert held[1] - held[0] == 128 * 96 + 96
    assert networks(plain).num_parameters == networks(aligned).num_parameters
    steps = [simulate(run, 1, 4, 8) for run in (plain, aligned)]
    before, after = (step.passes[0].work.flops for step in steps if step is not None)
    assert after - before >= 3 * 2 * (4 * 8) * 128 * 96  # once forward, twice back
