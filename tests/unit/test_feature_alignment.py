"""Alignment with the tokenizer's features: the loss, its gradient, its end, and what is refused."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_pipeline import Steps, metrics, train_in_process
from typed_commands import typed

from lgm_scale.config.rules import load_training_run
from lgm_scale.data.preparation import encode
from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.config import FeatureAlignmentConfig, LGMObjectiveConfig
from lgm_scale.families.lgm.feature_alignment import feature_distance, normalised
from lgm_scale.families.lgm.features import FEATURES_NAME
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.training import LGMTrainingModel
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


def test_teachers_are_normalised_over_the_tokens_of_each_image():
    features = normalised(3 + randn(2, N, C))
    torch.testing.assert_close(features.mean(1), torch.zeros(2, C), atol=1e-6, rtol=0)
    torch.testing.assert_close(features.std(1, correction=0), torch.ones(2, C))
    assert torch.equal(normalised(torch.ones(1, N, C)), torch.zeros(1, N, C))


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
    teacher = cut.merge(normalised(batch(0)["features"].float() - aligned.feature_means))
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
    small_pipeline, tmp_path
):
    featured = tmp_path / "latents"
    inputs = ("--images", small_pipeline.images, "--tokenizer", small_pipeline.tokenizer)
    said = typed(encode.main, *inputs, "--out", featured, "--workers", "0", "--features")
    assert said.status == 0, said.err
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
    assert metrics(stopped) == rows
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
    for out, change, message in (
        (whole, "block=1", "block: 2 there, 1 here"),
        (whole, "steps=6", "adding `--allow-change objective.feature_alignment.steps`"),
        (plain, "steps=5", "block: None there, 2 here"),
    ):
        path = config(out.name, asked)
        with pytest.raises(ConfigError, match=message):
            train_in_process(path, f"objective.feature_alignment.{change}")


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
