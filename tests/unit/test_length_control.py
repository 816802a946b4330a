"""The five length controls: one interface, and what each does to the latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.lgm.bundle import save_lgm_bundle
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.tokenizer.bundle import load_tokenizer, save_tokenizer_bundle
from lgm_scale.families.tokenizer.config import TokenizerModelConfig, TokenizerObjectiveConfig
from lgm_scale.families.tokenizer.length_control import (
    LENGTH_CONTROLS,
    LengthControl,
    build_length_control,
    exploration_noise,
)
from lgm_scale.families.tokenizer.network import Tokenizer, build_tokenizer
from lgm_scale.families.tokenizer.training import TokenizerTrainingModel
from lgm_scale.merging.tree import MergeTree
from lgm_scale.training.length_schedule import LengthSchedule

N, BLOCKS, DIM = 16, 4, 6
ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = torch.cuda.is_available()
MERGING = ("lgm", "fixed", "tome")


def control(name: str, dropped_tokens: str = "zero", seed: int = 0) -> LengthControl:
    torch.manual_seed(seed)
    return build_length_control(name, N, BLOCKS, DIM, dropped_tokens)


def latents(batch: int = 3, size: int = N, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, size, DIM, generator=torch.Generator().manual_seed(seed))


def model_config(name: str, dropped_tokens: str = "zero") -> TokenizerModelConfig:
    return TokenizerModelConfig(
        size="tiny",
        image_size=16,
        patch_size=4,
        num_base_tokens=N,
        latent_dim=DIM,
        codebook_size=8,
        length_control=name,  # type: ignore[arg-type]
        dropped_tokens=dropped_tokens,  # type: ignore[arg-type]
    )


# --- the interface ----------------------------------------------------------------------------


def test_every_control_is_known_by_its_name():
    assert set(LENGTH_CONTROLS) == {"lgm", "fixed", "tome", "truncate", "none"}
    for name in LENGTH_CONTROLS:
        assert control(name).name == name


@pytest.mark.parametrize("name", LENGTH_CONTROLS)
def test_full_length_is_the_exact_identity(name):
    z, learned = latents(), control(name)
    assert torch.equal(learned.full_length(z, N), z)
    assert torch.equal(learned(z, N), z)


@pytest.mark.parametrize("name", ["lgm", "fixed", "tome", "truncate"])
@pytest.mark.parametrize("num_tokens", [4, 7, 15])
def test_shapes_and_training_equal_evaluation(name, num_tokens):
    z, learned = latents(), control(name)
    full = learned.full_length(z, num_tokens)
    assert full.shape == z.shape
    assert not torch.allclose(full, z)
    torch.testing.assert_close(learned(z, num_tokens), full)  # without exploration noise


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("num_tokens", [4, 7, 15])
def test_merging_gives_each_token_the_mean_of_its_cluster(name, num_tokens):
    z, merging = latents(), control(name)
    labels = merging.cluster_labels(z, num_tokens)
    assert labels is not None
    assert labels.shape == (3, N)
    full = merging.full_length(z, num_tokens)
    for image in range(3):
        clusters = labels[image].unique()
        assert len(clusters) == num_tokens
        for cluster in clusters:
            members = (labels[image] == cluster).nonzero()[:, 0]
            assert len(set((members // (N // BLOCKS)).tolist())) == 1, "a cluster crosses a block"
            mean = z[image, members].mean(0)
            torch.testing.assert_close(full[image, members], mean.expand(len(members), -1))


@pytest.mark.parametrize(("name", "least"), [*((n, 4) for n in MERGING), ("truncate", 1)])
def test_lengths_out_of_range_are_refused(name, least):
    merging = control(name)
    for wrong in (least - 1, N + 1):
        with pytest.raises(ConfigError, match=rf"num_tokens: {wrong} is outside \[{least}, 16\]"):
            merging.full_length(latents(), wrong)
        with pytest.raises(ConfigError, match="is outside"):
            merging(latents(), wrong)
    merging.full_length(latents(), least)


def test_no_control_means_no_other_length():
    with pytest.raises(ConfigError, match=r"15 is outside \[16, 16\], .* 'none'"):
        control("none").full_length(latents(), 15)


def test_an_unknown_control_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'tomme' is unknown; choose from lgm, fixed, tome"):
        control("tomme")


@pytest.mark.parametrize("name", ["lgm", "fixed", "tome", "none"])
def test_one_length_per_image_is_for_truncation(name):
    with pytest.raises(ConfigError, match="use 'truncate'"):
        control(name).full_length(latents(), torch.tensor([4, 8, 16]))


# --- trees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lgm", "fixed"])
def test_tree_based_controls_equal_the_merge_tree(name):
    z, merging = latents(), control(name)
    assert merging.has_tree
    tree = MergeTree.from_embeddings(merging.embeddings, BLOCKS)  # type: ignore[arg-type]
    assert torch.equal(merging.tree().merges, tree.merges)
    for num_tokens in (4, 9):
        cut = tree.assignment(num_tokens)
        assert torch.equal(merging.full_length(z, num_tokens), cut.unmerge(cut.merge(z)))
        labels = merging.cluster_labels(z, num_tokens)
        assert labels is not None
        assert all(torch.equal(row, cut.labels) for row in labels)


def test_exploration_reaches_the_training_tree_alone():
    merging = control("lgm")
    noise = 5 * exploration_noise(0, 3, N)
    grow = merging.start_tree(noise)
    assert grow is not None
    expected = MergeTree.from_similarity(merging.similarity(), BLOCKS, noise)  # type: ignore[arg-type]
    assert torch.equal(grow().merges, expected.merges)
    assert not torch.equal(grow().merges, merging.tree().merges)
    z, cut = latents(), expected.assignment(6)
    torch.testing.assert_close(merging(z, 6, grow), cut.unmerge(cut.merge(z)))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")],
        ),
    ],
)
def test_a_tree_started_early_is_that_of_the_embeddings_then(device):
    """Its similarities are on their way to the host while other work, here a change, is queued."""
    merging = control("lgm").to(device)
    expected = merging.tree().merges
    grow = merging.start_tree()
    assert grow is not None
    with torch.no_grad():
        merging.embeddings.mul_(-1.0).add_(torch.randn_like(merging.embeddings))  # type: ignore[operator,union-attr,arg-type]
    assert torch.equal(grow().merges, expected)
    assert not torch.equal(merging.tree().merges, expected)


def test_the_fixed_tree_comes_from_the_seed_and_has_no_parameters():
    first, again, other = control("fixed"), control("fixed"), control("fixed", seed=1)
    assert torch.equal(first.tree().merges, again.tree().merges)
    assert not torch.equal(first.tree().merges, other.tree().merges)
    assert list(first.parameters()) == []
    assert first.similarity() is None
    noise = 5 * exploration_noise(0, 3, N)
    assert torch.equal(
        first(latents(), 6, first.start_tree(noise)), first.full_length(latents(), 6)
    )
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.tree().merges, other.tree().merges)


@pytest.mark.parametrize("name", ["tome", "truncate", "none"])
def test_a_control_without_a_tree_says_what_needs_one(name):
    assert not control(name).has_tree
    with pytest.raises(ConfigError, match=f"'{name}' has no merge tree, and the generator needs"):
        control(name).tree()


# --- truncation -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 5, 15])
def test_truncation_keeps_a_prefix_and_writes_zeros(num_tokens):
    z = latents()
    full = control("truncate").full_length(z, num_tokens)
    assert torch.equal(full[:, :num_tokens], z[:, :num_tokens])
    assert (full[:, num_tokens:] == 0).all()


def test_truncation_of_each_image_at_its_own_length():
    z, truncate = latents(), control("truncate")
    full = truncate(z, torch.tensor([2, 16, 9]))
    for image, num_tokens in enumerate((2, 16, 9)):
        alone = truncate.full_length(z[image : image + 1], num_tokens)
        assert torch.equal(full[image : image + 1], alone)


def test_a_learned_filler_stands_where_tokens_were_dropped():
    truncate = control("truncate", "learned")
    with torch.no_grad():
        truncate.mask_token.normal_()  # type: ignore[union-attr,operator]
    full = truncate(latents(), 5)
    assert torch.equal(full[:, :5], latents()[:, :5])
    expected = truncate.mask_token.detach().expand(3, N - 5, DIM)  # type: ignore[union-attr,operator]
    assert torch.equal(full[:, 5:], expected)
    full.sum().backward()
    torch.testing.assert_close(truncate.mask_token.grad, torch.full((DIM,), 3.0 * (N - 5)))
    # With nothing dropped it has a gradient all the same, or DDP would wait for it.
    truncate.zero_grad()
    truncate(latents(), N).sum().backward()
    assert torch.equal(truncate.mask_token.grad, torch.zeros(DIM))  # type: ignore[arg-type]


def test_the_aligned_start_of_a_prefix_covers_the_image():
    order = build_length_control("truncate", 64, 4, DIM, "zero").lattice_order()
    assert torch.equal(order.sort().values, torch.arange(64))
    rows, columns = order[:16] // 8, order[:16] % 8
    quarters = (rows // 4 * 2 + columns // 4).bincount(minlength=4)
    assert quarters.min() >= 2
    assert torch.equal(control("lgm").lattice_order(), torch.arange(N))


def test_lengths_per_sample_follow_the_weights_and_the_sample():
    schedule = LengthSchedule((4, 8, 16), (2, 1, 1), seed=3)
    ids = torch.arange(8000)
    drawn = schedule.per_sample(5, ids)
    shares = torch.stack([(drawn == k).double().mean() for k in (4, 8, 16)])
    error = 5 * (0.25 / 8000) ** 0.5
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.25]).double(), atol=error, rtol=0)
    assert torch.equal(schedule.per_sample(5, ids[100:110]), drawn[100:110])
    assert not torch.equal(schedule.per_sample(6, ids), drawn)


def test_the_longest_comes_first_and_then_what_would_have_come():
    for weights in (None, (2, 1, 1)):
        plain = LengthSchedule((4, 16, 8), weights, seed=3)
        late = LengthSchedule((4, 16, 8), weights, seed=3, longest_first=5)
        assert [late.num_tokens(step) for step in range(5)] == [16] * 5
        after = [late.num_tokens(step) for step in range(5, 30)]
        assert after == [plain.num_tokens(step) for step in range(5, 30)]
    ids = torch.arange(100)
    assert (late.per_sample(4, ids) == 16).all()
    assert torch.equal(late.per_sample(5, ids), plain.per_sample(5, ids))


# --- in a tokenizer ---------------------------------------------------------------------------


def training_step(name: str, num_tokens: int | torch.Tensor, dropped: str = "zero") -> Tokenizer:
    torch.manual_seed(0)
    net = build_tokenizer(model_config(name, dropped))
    model = TokenizerTrainingModel(net, TokenizerObjectiveConfig(), seed=0)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    batch = {
        "images": images,
        "sample_ids": torch.arange(3),
        "step": 0,
        "num_tokens": num_tokens,
    }
    model.loss(model(batch), batch).backward()
    return net


@pytest.mark.parametrize(
    ("name", "num_tokens", "dropped"),
    [
        ("lgm", 6, "zero"),
        ("lgm", N, "zero"),
        ("fixed", 6, "zero"),
        ("tome", 6, "zero"),
        ("truncate", 6, "zero"),
        ("truncate", 6, "learned"),
        ("truncate", torch.tensor([2, 6, 16]), "learned"),
        ("none", N, "zero"),
    ],
)
def test_a_training_step_gives_every_parameter_a_gradient(name, num_tokens, dropped):
    net = training_step(name, num_tokens, dropped)
    assert [key for key, p in net.named_parameters() if p.grad is None] == []


def test_merging_trains_its_embeddings_where_it_merges():
    assert training_step("lgm", 6).merging.embeddings.grad.abs().max() > 0  # type: ignore[union-attr]
    assert training_step("lgm", N).merging.embeddings.grad.abs().max() == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", LENGTH_CONTROLS)
def test_bundles_keep_the_control(tmp_path, name):
    torch.manual_seed(2)
    config = model_config(name)
    net = build_tokenizer(config).eval()
    tree = net.merge_tree() if net.merging.has_tree else None
    save_tokenizer_bundle(tmp_path / "bundle", config, net.state_dict(), tree, {})
    loaded = load_tokenizer(tmp_path / "bundle")
    assert loaded.merging.name == name
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    k = N if name == "none" else 6
    with torch.no_grad():
        assert torch.equal(loaded.reconstruct(images, k), net.reconstruct(images, k))


def test_no_generator_bundle_from_a_tokenizer_without_a_tree(tmp_path):
    config = model_config("tome")
    net = build_tokenizer(config)
    save_tokenizer_bundle(tmp_path / "tokenizer", config, net.state_dict(), None, {})
    with pytest.raises(CheckpointError, match="no merge tree, and a generator needs one"):
        save_lgm_bundle(
            tmp_path / "generator",
            LGMModelConfig(),
            {},
            LatentStats(torch.zeros(DIM), torch.ones(DIM)),
            (),
            tmp_path / "tokenizer",
            {},
        )
    assert not (tmp_path / "generator").exists()


# --- configurations ---------------------------------------------------------------------------

LGM_YAML = "yamls/demo/tokenizer.yaml"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["model.length_control=truncate", "lengths.choices=[0,8,8,8]"],
            r"\[0\] outside \[1, 64\]",
        ),
        (["lengths.choices=[1,8,8,8]"], r"\[1\] outside \[4, 64\]"),
        (["model.length_control=none"], r"outside \[64, 64\]"),
        (["lengths.per_sample=true"], "per_sample: true needs model.length_control: truncate"),
        (["model.dropped_tokens=learned"], "model.dropped_tokens: learned has no effect"),
        (["model.length_control=tomme"], 'model.length_control: "tomme" is wrong'),
    ],
)
def test_wrong_configurations_name_their_key(overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        load_training_run(str(ROOT / LGM_YAML), overrides, world_size=1, has_gpu=None)


def test_the_truncation_variants_are_valid():
    overrides = ["model.length_control=truncate", "model.dropped_tokens=learned"]
    overrides += ["lengths.per_sample=true", "lengths.choices=[1,8,8,64]"]
    config = load_training_run(str(ROOT / LGM_YAML), overrides, world_size=1, has_gpu=None)
    assert config.lengths.per_sample
