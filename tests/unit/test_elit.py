"""ELIT: published counts and costs, the interface against a plain reading of it, budgets."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.config import (
    SIT_SIZES,
    SPLITS,
    ELITModelConfig,
    InterfaceConfig,
    SpaceConfig,
)
from lgm_scale.families.elit.interface import from_windows, to_windows
from lgm_scale.families.elit.network import ELIT, SiT, build_elit, sincos_table

WIDTH, HEADS = 32, 4


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def elit(
    side: int = 8, group_size: int = 2, patch_size: int = 2, channels: int = 3, **options
) -> ELIT:
    """Four blocks; every parameter is random, because the zero start would hide everything."""
    options = {"head_blocks": 1, "tail_blocks": 1, "position_rows": 100} | options
    net = ELIT(WIDTH, 4, HEADS, channels, side, patch_size, 5, group_size=group_size, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def inputs(net: SiT, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z_t = randn(batch, net.channels, net.side, net.side, seed=1)
    return z_t, torch.linspace(0.1, 0.9, batch), torch.arange(batch)


# --- against what was measured on the authors' release ----------------------------------------


@pytest.fixture(scope="module")
def published(golden_dir) -> dict:
    return json.loads((golden_dir / "elit_published_costs.json").read_text())


def on_meta(size: str, side: int, group_size: int, head: int, tail: int) -> tuple[SiT, ELIT]:
    row = SIT_SIZES[size]
    common = (row.width, row.depth, row.num_heads, 4, side, 2, 1000)
    with torch.device("meta"):
        net = ELIT(*common, head_blocks=head, tail_blocks=tail, group_size=group_size)
        return SiT(*common), net


def millions(module: torch.nn.Module, fixed: int = 0) -> float:
    return (sum(parameter.numel() for parameter in module.parameters()) + fixed) / 1e6


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_parameter_counts_are_the_releases(published, size):
    expected = published["params_m"][size]
    sit, net = on_meta(size, 32, 4, 2, 2)
    _, large = on_meta(size, 64, 8, 2, 2)
    fixed = sit.pos_embed.numel()
    found = {
        "sit_256": millions(sit, fixed),
        "elit_256": millions(net, fixed),
        "read": millions(net.read),
        "write": millions(net.write),
        "elit_512": millions(large, large.pos_embed.numel()),
    }
    assert {name: round(count, 2) for name, count in found.items()} == expected
    row = SIT_SIZES[size]
    assert (row.params_m, row.elit_params_m) == (expected["sit_256"], expected["elit_256"])


def test_operations_are_the_releases_within_half_a_percent(published):
    for row in published["gflops"]:
        head, core, tail = row["split"]
        sit, net = on_meta(row["size"], row["side"], row["group_size"], head, tail)
        assert head + core + tail == len(net.blocks)
        full = net.num_base_tokens
        assert sit.flops(full) / 1e9 == pytest.approx(row["sit"], rel=5e-3)
        for (part, whole), gflops in zip(published["budgets"], row["elit"], strict=True):
            found = net.flops(full * part // whole) / 1e9
            assert found == pytest.approx(gflops, rel=5e-3), (row, part, whole)


def test_splits_fill_the_blocks():
    for sizes in SPLITS.values():
        assert all(sum(split) == SIT_SIZES[size].depth for size, split in sizes.items())
    assert SPLITS["released"]["xl"] == (8, 16, 4)
    assert SPLITS["declared"]["xl"] == (4, 20, 4)


@pytest.mark.parametrize("drop_mode", ["skip_core", "remove"])
def test_operations_against_torchs_counter(drop_mode):
    net = elit(group_size=2, drop_mode=drop_mode).requires_grad_(False)
    z_t, t, labels = inputs(net, batch=4)
    for num_tokens in net.token_lengths:
        with (
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
            torch.no_grad(),
        ):
            net(z_t, t, labels, num_tokens)
        expected = 4 * net.flops(num_tokens)
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


# --- the host ---------------------------------------------------------------------------------


def test_positions_say_column_then_row():
    table, grid, width = sincos_table(16, 3), 3, 16
    for row in range(grid):
        for column in range(grid):
            expected = []
            for place in (column, row):
                rates = [10000 ** (-i / (width // 4)) for i in range(width // 4)]
                expected += [math.sin(place * rate) for rate in rates]
                expected += [math.cos(place * rate) for rate in rates]
            found = table[row * grid + column]
            torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_patches_go_back_where_they_came_from():
    net = SiT(48, 1, 4, 3, 8, 2, 5)  # 3 x 2 x 2 = 12 channels fit into 48
    image = randn(2, 3, 8, 8)
    with torch.no_grad():
        weight = torch.zeros(48, 3, 2, 2)
        for channel in range(3):
            for y in range(2):
                for x in range(2):
                    weight[(y * 2 + x) * 3 + channel, channel, y, x] = 1.0
        net.x_embed.weight.copy_(weight)
        patches = net.x_embed(image).flatten(2).transpose(1, 2)[..., :12]
    assert torch.equal(net._unpatchify(patches.contiguous()), image)


def test_a_fresh_network_predicts_zero():
    net = ELIT(WIDTH, 4, HEADS, 3, 8, 2, 5, head_blocks=1, tail_blocks=1, group_size=2)
    assert not net(*inputs(net), 8).any()


def test_time_runs_the_other_way_inside():
    """Our t = 1 is data and v = data - noise; the release's s = 0 is data, u = noise - data."""
    net = elit()
    z_t, t, labels = inputs(net)
    ours, theirs = net(z_t, t, labels, 8), net.forward_released(z_t, 1 - t, labels, 8)
    assert torch.equal(ours, -theirs)
    assert (net.forward_released(z_t, t, labels, 8) - theirs).abs().max() > 0.01  # t counts


def test_a_sit_has_one_length():
    net = SiT(WIDTH, 2, HEADS, 3, 8, 2, 5)
    assert net.token_lengths == (16,)
    with pytest.raises(ConfigError, match="no latents and runs at 16"):
        net(*inputs(net), 8)


# --- windows ----------------------------------------------------------------------------------


def test_windows_hold_their_cells_in_raster_order():
    grid, size = 6, 3
    places = torch.arange(grid * grid).view(1, grid * grid, 1)
    windows = to_windows(places, grid, size)
    assert windows.shape == (1, 4, 9, 1)
    for row in range(2):
        for column in range(2):
            for j in range(9):
                y, x = row * size + j // size, column * size + j % size
                assert int(windows[0, row * 2 + column, j, 0]) == y * grid + x
    assert torch.equal(from_windows(windows, grid, size), places)


# --- the interface ----------------------------------------------------------------------------


def test_the_fresh_interface_is_the_identity_but_for_its_offsets():
    net = ELIT(WIDTH, 4, HEADS, 3, 8, 2, 5, head_blocks=1, tail_blocks=1, group_size=2)
    x, condition = randn(2, 16, WIDTH), randn(2, WIDTH, seed=1)
    with torch.no_grad():
        latents, spatial = net.read(x, condition)
        assert (net.write(spatial, latents) - x).abs().max() > 0.01
        net.read.offset.zero_()
        net.write.offset.zero_()
        latents, spatial = net.read(x, condition)
        assert torch.equal(net.write(spatial, latents), x)
    # What is read at first is the queries and their positions, whatever the image.
    rows = to_windows(net.read.positions[None, :16], 4, 2)
    assert torch.equal(latents, (net.read.queries + rows).expand_as(latents))


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def attend(layer, queries, context):
    """One window, head by head. Shapes: [Q, C], [J, C]."""
    q, kv = linear(layer.q, queries), linear(layer.kv, context)
    k, v = kv[:, :WIDTH], kv[:, WIDTH:]
    q = q / (q.square().mean(-1, keepdim=True).sqrt() + 1e-5) * layer.q_norm.weight
    k = k / (k.square().mean(-1, keepdim=True).sqrt() + 1e-5) * layer.k_norm.weight
    out, dim = [], WIDTH // HEADS
    for h in range(HEADS):
        part = slice(h * dim, (h + 1) * dim)
        out.append(torch.softmax(q[:, part] @ k[:, part].T / dim**0.5, -1) @ v[:, part])
    return linear(layer.proj, torch.cat(out, -1))


def feed(mlp, x):
    return linear(mlp.fc2, F.gelu(linear(mlp.fc1, x), approximate="tanh"))


def normed(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def plainly(net: ELIT, x: torch.Tensor, condition: torch.Tensor, k: int) -> torch.Tensor:
    """The transform, one image and one window after the other. Shapes: [B, N, C] -> same."""
    grid, g = net.grid, net.group_size
    blocks, last = list(net.blocks), len(net.blocks) - net.tail_blocks
    for block in blocks[: net.head_blocks]:
        x = block(x, condition)
    images = []
    for b in range(len(x)):
        m = linear(net.read.modulation[1], F.silu(condition[b])).chunk(7)
        windows, kept = {}, []
        for r in range(grid // g):
            for s in range(grid // g):
                cells = [(r * g + j // g) * grid + s * g + j % g for j in range(g * g)]
                patches = x[b, cells] + net.read.offset
                seen = normed(patches) * (1 + m[1]) + m[0]
                z = net.read.queries
                z = z + m[2] * attend(net.read.attn, z, seen)
                z = z + m[5] * feed(net.read.mlp, normed(z) * (1 + m[4]) + m[3])
                z = z + net.read.positions[cells]
                windows[r, s] = (cells, patches, z)
                kept.append(z[:k])
        core = torch.cat(kept)[None]
        for block in blocks[net.head_blocks : last]:
            core = block(core, condition[b : b + 1])
        out = torch.empty_like(x[b])
        for i, (cells, patches, z) in enumerate(windows.values()):
            done = core[0, i * k : (i + 1) * k]
            latents = done if net.drop_mode == "remove" else torch.cat((done, z[k:]))
            p = patches + net.write.offset
            p = p + attend(net.write.attn, p, latents)
            out[cells] = p + feed(net.write.mlp, p)
        images.append(out)
    x = torch.stack(images)
    for block in blocks[last:]:
        x = block(x, condition)
    return x


@pytest.mark.parametrize("drop_mode", ["skip_core", "remove"])
@pytest.mark.parametrize(("side", "group_size"), [(8, 2), (8, 4), (12, 3), (8, 1)])
@torch.no_grad()
def test_all_windows_at_once_equal_one_after_the_other(side, group_size, drop_mode):
    net = elit(side=side, group_size=group_size, drop_mode=drop_mode)
    x, condition = randn(2, net.num_base_tokens, WIDTH), randn(2, WIDTH, seed=1)
    for k in {1, (net.max_budget + 1) // 2, net.max_budget}:
        found = net.transform(x, condition, k * net.num_windows)
        expected = plainly(net, x, condition, k)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_full_budget_equals_a_core_on_all_latents_in_raster_order():
    net = elit(side=12, group_size=3)
    x, condition = randn(2, 36, WIDTH), randn(2, WIDTH, seed=1)
    found = net.transform(x, condition, 36)
    x = net.blocks[0](x, condition)
    latents, spatial = net.read(x, condition)
    core = from_windows(latents, 6, 3)  # never gathered
    for block in list(net.blocks)[1:3]:
        core = block(core, condition)
    expected = net.blocks[3](net.write(spatial, to_windows(core, 6, 3)), condition)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_windows_of_three_keep_exact_counts():
    """J = 9: fractions of it are not exact in floating point, so budgets are integers."""
    net = elit(side=12, group_size=3)
    assert net.token_lengths == tuple(4 * k for k in range(1, 10))
    seen: list[int] = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for k in range(1, 10):
        assert net.budget(4 * k) == k
        seen.clear()
        net(*inputs(net), 4 * k)
        assert seen == [36, 4 * k, 4 * k, 36]


def gradient_to_read(net: ELIT, num_tokens: int) -> torch.Tensor:
    """How much the output depends on each latent of the query table, [J]."""
    net.zero_grad()
    net(*inputs(net), num_tokens).square().sum().backward()
    assert net.read.queries.grad is not None
    return net.read.queries.grad.abs().sum(-1)


def test_dropped_latents_reach_write_unless_they_are_removed():
    assert (gradient_to_read(elit(drop_mode="skip_core"), 4) > 0).tolist() == [True] * 4
    assert (gradient_to_read(elit(drop_mode="remove"), 4) > 0).tolist() == [True] + 3 * [False]
    assert (gradient_to_read(elit(drop_mode="remove"), 12) > 0).tolist() == 3 * [True] + [False]


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    net = elit()
    z_t, t, labels = inputs(net, batch=4)
    together = net(z_t, t, labels, 8)
    alone = torch.cat([net(z_t[i : i + 1], t[i : i + 1], labels[i : i + 1], 8) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_bfloat16_is_near():
    net = elit()
    z_t, t, labels = inputs(net)
    exact = net(z_t, t, labels, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(z_t, t, labels, 8).float()
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 3}, "windows of 3 x 3 tokens do not divide the grid of 4 x 4; valid: 1, 2"),
        ({"group_size": 0}, "windows of 0 x 0"),
        ({"head_blocks": 2, "tail_blocks": 2}, "leave none for the core"),
        ({"position_rows": 15}, "15 rows for 16 latents"),
        ({"drop_mode": "drop"}, "use skip_core or remove"),
        ({"patch_size": 3}, "3 does not divide the state's side 8"),
    ],
)
def test_sizes_that_do_not_divide(change, message):
    with pytest.raises(ConfigError, match=message):
        elit(**change)


@pytest.mark.parametrize("num_tokens", [0, -4, 3, 6, 20, 64])
def test_budgets_outside_of_one_to_j(num_tokens):
    net = elit()
    with pytest.raises(ConfigError, match=r"k x 4 windows with k from 1 to 4: 4, 8, \.\.\., 16"):
        net(*inputs(net), num_tokens)


def test_a_split_that_a_size_does_not_have():
    space = SpaceConfig(kind="pixels", image_size=32)
    model = ELITModelConfig(size="s", interface=InterfaceConfig(split="paper"))
    with pytest.raises(ConfigError, match="'paper' knows no size 's'; it has b, xl"):
        build_elit(model, space)
