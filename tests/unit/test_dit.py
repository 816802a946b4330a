"""MergeDiT: the release's numbers, merge-aware attention, and what must not depend on K."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.config import DIT_SIZES
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.layers import (
    ATTENTION_FORMS,
    choose_attention,
    extra_channel_attention,
    proportional_attention,
    score_attention,
)
from lgm_scale.merging.tree import MergeAssignment, MergeTree

# As published, at D = 32, N = 256 and 1000 classes: width, layers, heads, millions of parameters.
PUBLISHED_SIZES = {
    "s": (512, 8, 8, 39.4),
    "b": (768, 12, 12, 130.6),
    "l": (1024, 24, 16, 458.2),
    "xl": (1152, 28, 16, 675.3),
    "h": (1280, 32, 16, 951.4),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def net(golden_dit) -> MergeDiT:
    return golden_dit


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(randn(256, 12))


# --- against the release ----------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [32, 64, 128, 256])
@torch.no_grad()
def test_velocity_equals_the_release(golden, golden_cut, net, num_tokens):
    file, (cut, order) = golden("dit_tiny_io"), golden_cut(num_tokens)
    v = net(file[f"k{num_tokens}.x_t"][:, order], file["t"], file["y"], cut)
    expected = file[f"k{num_tokens}.velocity"][:, order]
    torch.testing.assert_close(v, expected, atol=1e-5, rtol=0)


def test_names_and_shapes_equal_the_release(golden_dir, our_dit_name):
    published = json.loads((golden_dir / "lgm_release_dit_xl_keys.json").read_text())
    with torch.device("meta"):
        net = MergeDiT.from_size("xl", latent_dim=32, num_base_tokens=256, num_classes=1000)
    ours = {name: list(value.shape) for name, value in net.state_dict().items()}
    assert {our_dit_name(name): shape for name, shape in published.items()} == ours


@pytest.mark.parametrize("size", list(DIT_SIZES))
def test_parameter_counts(size):
    with torch.device("meta"):
        net = MergeDiT.from_size(size, latent_dim=32, num_base_tokens=256, num_classes=1000)
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert round(millions, 1) == DIT_SIZES[size].params_m


def test_sizes_are_the_published_ones():
    for size, row in PUBLISHED_SIZES.items():
        ours = DIT_SIZES[size]
        assert (ours.width, ours.depth, ours.num_heads, ours.params_m) == row


# --- attention --------------------------------------------------------------------------------

SIZES = torch.tensor([1, 5, 2, 1, 9, 30, 3])


def attention_inputs(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    q, k, v = (randn(2, 3, len(SIZES), head_dim, seed=s, dtype=torch.float64) for s in range(3))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attention_over_duplicates(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q, k.repeat_interleave(SIZES, dim=2), v.repeat_interleave(SIZES, dim=2)
    )


FORMS = [proportional_attention, extra_channel_attention, score_attention]


@pytest.mark.parametrize("attend", FORMS)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 30])
def test_a_merged_token_attends_like_its_duplicates(attend, head_dim):
    q, k, v = attention_inputs(head_dim, torch.float64)
    out = attend(q, k, v, SIZES.double().log())
    torch.testing.assert_close(out, attention_over_duplicates(q, k, v), atol=1e-12, rtol=0)


def test_without_sizes_attention_is_plain():
    q, k, v = attention_inputs(16, torch.float64)
    plain = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(proportional_attention(q, k, v, None), plain)
    ones = torch.zeros(len(SIZES), dtype=torch.float64)
    torch.testing.assert_close(proportional_attention(q, k, v, ones), plain)


@pytest.mark.parametrize("head_dim", [64, 72, 80])
def test_all_forms_agree_in_float32(head_dim):
    q, k, v = attention_inputs(head_dim, torch.float32)
    log_sizes = SIZES.float().log()
    masked = proportional_attention(q, k, v, log_sizes)
    for attend in FORMS[1:]:
        torch.testing.assert_close(attend(q, k, v, log_sizes), masked, atol=2e-6, rtol=0)


@pytest.mark.parametrize("head_dim", [64, 72, 80])
def test_all_forms_are_right_within_rounding_in_bfloat16(head_dim):
    """Against float64 on the same rounded inputs. One unit of rounding at 2 is 2^-7."""
    q, k, v = attention_inputs(head_dim, torch.bfloat16)
    exact = attention_over_duplicates(q.double(), k.double(), v.double())
    log_sizes = SIZES.float().log()
    for attend in FORMS:
        out = attend(q, k, v, log_sizes)
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).abs().max() < 2**-6


def test_all_forms_have_the_same_gradients():
    gradients = []
    # Newer versions refuse FlexAttention's backward pass on a CPU; tests/gpu has it.
    for attend in FORMS if torch.__version__.startswith("2.7.") else FORMS[:2]:
        inputs = [x.requires_grad_() for x in attention_inputs(72, torch.float64)]
        out = attend(*inputs, SIZES.double().log())
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    for found in gradients[1:]:
        for mine, masked in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(mine, masked, atol=1e-11, rtol=0)


def test_a_network_takes_the_form_that_is_chosen(golden_dit, monkeypatch):
    called = []
    for name, form in ATTENTION_FORMS.items():
        monkeypatch.setitem(
            ATTENTION_FORMS, name, lambda *given, f=form, n=name: called.append(n) or f(*given)
        )
    inputs = attention_inputs(16, torch.float32)
    for name in ("auto", *ATTENTION_FORMS):
        choose_attention(golden_dit, name)
        form = golden_dit.blocks[-1].attn.form
        proportional_attention(*inputs, SIZES.float().log(), form)
    choose_attention(golden_dit, "auto")
    assert called == ["mask", *ATTENTION_FORMS], "auto is the mask on a CPU"


# --- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [4, 32, 255])
@torch.no_grad()
def test_merged_tokens_act_like_their_duplicates(net, tree, num_tokens):
    """K tokens give what N tokens give when equal tokens sit at equal positions."""
    cut, full = tree.assignment(num_tokens), tree.assignment(256)
    net.double()
    z_t = randn(2, num_tokens, 8, dtype=torch.float64)
    t, labels = torch.tensor([0.3, 0.8]), torch.tensor([1, 10])
    v = net(z_t, t, labels, cut)
    net.pos_embed.copy_(cut.unmerge(cut.merge(net.pos_embed)))
    expected = net(cut.unmerge(z_t), t, labels, full)
    torch.testing.assert_close(cut.unmerge(v), expected, atol=1e-7, rtol=0)


@torch.no_grad()
def test_cluster_numbers_do_not_matter(net, tree):
    cut = tree.assignment(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    renumbered = MergeAssignment(order.argsort()[cut.labels], cut.sizes[order], cut.pool[:, order])
    z_t, t, labels = randn(3, 64, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 10])
    v = net(z_t, t, labels, cut)
    torch.testing.assert_close(
        net(z_t[:, order], t, labels, renumbered), v[:, order], atol=2e-6, rtol=0
    )


@torch.no_grad()
def test_sizes_positions_time_and_label_all_count(net, tree):
    cut = tree.assignment(32)
    z_t, t, labels = randn(2, 32, 8), torch.tensor([0.2, 0.6]), torch.tensor([1, 2])
    v = net(z_t, t, labels, cut)
    equal_sizes = MergeAssignment(cut.labels, torch.ones_like(cut.sizes), cut.pool)
    moved = MergeAssignment(cut.labels, cut.sizes, cut.pool.roll(1, dims=1))
    for other in (
        net(z_t, t, labels, equal_sizes),
        net(z_t, t, labels, moved),
        net(z_t, t + 0.1, labels, cut),
        net(z_t, t, labels + 1, cut),
        net(z_t + 0.1, t, labels, cut),
    ):
        assert ((other - v).abs().amax(dim=(1, 2)) > 1e-4).all()


@pytest.mark.parametrize("num_tokens", [32, 256])
def test_output_is_zero_at_initialisation(tree, num_tokens):
    torch.manual_seed(0)
    net = MergeDiT.from_size("tiny", latent_dim=8, num_base_tokens=256, num_classes=10)
    v = net(
        randn(2, num_tokens, 8), torch.rand(2), torch.tensor([0, 10]), tree.assignment(num_tokens)
    )
    assert v.shape == (2, num_tokens, 8)
    assert not v.any()


def test_initialisation():
    torch.manual_seed(0)
    net = MergeDiT.from_size("tiny", latent_dim=8, num_base_tokens=256, num_classes=1000)
    for table in (net.pos_embed, net.label_embed.table.weight, net.t_embed.mlp[0].weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.05)
    for block in net.blocks:
        assert not block.modulation[1].weight.any()
        bound = (6 / (128 + 3 * 128)) ** 0.5  # Xavier
        assert 0.95 * bound < block.attn.qkv.weight.abs().max() <= bound


@pytest.mark.parametrize("num_tokens", [16, 64])
def test_gradients_reach_every_parameter(net, tree, num_tokens):
    labels = torch.tensor([3, 10])
    v = net(randn(2, num_tokens, 8), torch.tensor([0.2, 0.7]), labels, tree.assignment(num_tokens))
    (v * randn(*v.shape, seed=5)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name
    assert (net.pos_embed.grad.abs().amax(dim=-1) > 0).all(), "a position without a gradient"
    used = net.label_embed.table.weight.grad.abs().amax(dim=-1) > 0
    assert used.nonzero().flatten().tolist() == [3, 10]


@torch.no_grad()
def test_null_label_is_one_past_the_classes(net, tree):
    assert net.null_label == net.num_classes == 10
    assert net.label_embed.table.num_embeddings == 11
    z_t, t, cut = randn(1, 32, 8), torch.tensor([0.5]), tree.assignment(32)
    outputs = [net(z_t, t, torch.tensor([label]), cut) for label in range(11)]
    assert all((v - outputs[net.null_label]).abs().max() > 1e-3 for v in outputs[:10])
    with pytest.raises(IndexError):
        net(z_t, t, torch.tensor([11]), cut)


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix(net, tree):
    cut = tree.assignment(64)
    z_t, t, labels = randn(3, 64, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 10])
    together = net(z_t, t, labels, cut)
    alone = [net(z_t[i : i + 1], t[i : i + 1], labels[i : i + 1], cut) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-6, rtol=0)


@pytest.mark.parametrize("num_tokens", [32, 256])
@torch.no_grad()
def test_bfloat16_stays_close(net, tree, num_tokens):
    z_t, t, labels = randn(2, num_tokens, 8), torch.tensor([0.3, 0.8]), torch.tensor([1, 10])
    cut = tree.assignment(num_tokens)
    exact = net(z_t, t, labels, cut)
    with torch.autocast("cpu", torch.bfloat16):
        assert (net(z_t, t, labels, cut) - exact).abs().max() < 0.05
    half = net.bfloat16()(z_t.bfloat16(), t, labels, cut)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.05


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="width 100 is not divisible by num_heads 3"):
        MergeDiT(100, 1, 3, latent_dim=8, num_base_tokens=16, num_classes=10)
