"""A training step on a GPU: it waits for nothing, copies on the side, and is the plain one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gpu_cases import CASES, TREE, no_waiting
from PIL import Image

from benchmarks.gpu_steps import TrainStep
from lgm_scale.data.decoding import draw_crop, random_resized_crop
from lgm_scale.data.scaling import DeviceCrop, cut_window, largest_window
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.merging.linkage import start_host_copy
from lgm_scale.parallel.blocks import checkpoint_blocks
from lgm_scale.parallel.torch_internals import lerp_all_


@pytest.fixture
def steps(device) -> TrainStep:
    torch.manual_seed(0)
    net = MergeDiT(144, 2, 2, 32, 64, 1000).to(device)
    return TrainStep(net, TREE, device)


@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_a_step_never_waits(device, steps, recompute):
    checkpoint_blocks(list(steps.net.blocks), recompute)
    batches = [steps.batch(k, 4) for k in (16, 64)]
    for batch in batches:  # cuts and constants reach the device once
        steps(*batch)
    with no_waiting(device):
        losses = [steps(*batch) for batch in (*batches, *batches)]
    assert all(math.isfinite(value) for value in torch.stack(losses).tolist())
    moved = [(a - w).abs().max() for a, w in zip(steps.average, steps.weights, strict=True)]
    assert max(moved) > 0, "weights move, and the average behind them"


@pytest.mark.parametrize("size", [64, 256])
def test_crops_are_those_of_pillow(device, size):
    items, expected = [], []
    for seed, (height, width) in enumerate([(size, size), (375, 500), (2 * size - 1, 90)]):
        rngs = [np.random.default_rng(seed) for _ in range(3)]
        pixels = rngs[0].choice([0, 85, 255], (height, width, 3)).astype(np.uint8)
        image, flip = Image.fromarray(pixels), seed == 1
        drawn = draw_crop(image, size, rngs[1])
        items.append(cut_window(drawn, flip, size, largest_window(size), "image"))
        made = np.asarray(random_resized_crop(image, size, rngs[2])).transpose(2, 0, 1)
        expected.append(torch.from_numpy(made[..., ::-1].copy() if flip else made.copy()))
    batch = {
        name: torch.from_numpy(np.stack([item[name] for item in items])).to(device)
        for name in items[0]
    }
    finish = DeviceCrop(size, largest_window(size))
    with no_waiting(device):
        images = finish(batch)["images"]
    assert torch.equal(images.cpu(), torch.stack(expected))


def test_waiting_is_seen(device):
    if device.type == "cpu":
        pytest.skip("a CPU waits for nothing")
    with no_waiting(device), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device=device).sum().item()


def test_the_average_of_many_tensors_at_once_is_that_of_a_loop(device):
    net = CASES["lgm"].network().to(device)
    weights = [p.detach() for p in net.parameters()]
    average = [torch.zeros_like(weight) for weight in weights]
    one_by_one = [torch.zeros_like(weight) for weight in weights]
    for _ in range(3):
        lerp_all_(average, weights, 1e-3)
        for mean, weight in zip(one_by_one, weights, strict=True):
            mean.lerp_(weight, 1e-3)
    for mean, expected in zip(average, one_by_one, strict=True):
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-9)


def test_the_fused_optimizer_does_what_the_plain_one_does(device):
    fused, plain = (CASES["lgm"].network().to(device) for _ in range(2))
    optimizers = [
        torch.optim.AdamW(net.parameters(), lr=1e-3, fused=fast, foreach=False)
        for net, fast in ((fused, True), (plain, False))
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator).to(device)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_host_copy_has_the_values_of_its_moment(device):
    values = torch.arange(5.0, device=device)
    with no_waiting(device):
        arrived = start_host_copy(values)
    if device.type == "cuda":
        values.mul_(0)  # queued behind the copy
    assert arrived().tolist() == [0, 1, 2, 3, 4]
    assert arrived().device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_host_copy_does_not_wait_for_what_is_queued_after_it():
    x = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    arrived = start_host_copy(x[0, :3])
    for _ in range(30):  # some tenths of a second
        x = x @ x
    behind = torch.cuda.Event()
    behind.record()
    host = arrived()
    assert not behind.query(), "the copy was there before the products were"
    assert host.is_pinned()
    torch.cuda.synchronize()
