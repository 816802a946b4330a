"""One training step and one batch of samples of a generator, and how long they take.

The step is a run's without Composer: keyed draws, merged noise, the size-weighted error, AdamW and
the moving average. Loading, clipping and guards are left out. Nothing in it waits for the GPU.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.generator import LATENT_DIM, NUM_CLASSES
from lgm_scale import flow
from lgm_scale.families.lgm.guidance import Velocity
from lgm_scale.families.lgm.sampling import sample_latents
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.parallel.torch_internals import lerp_all_
from lgm_scale.randomness import Purpose
from lgm_scale.sampling.config import SamplerConfig

SAMPLER = SamplerConfig(num_steps=26, cfg_scale=2.0)
"""25 Euler steps, guided at times of 0.15 and later."""


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16, the published runs' precision."""
    return torch.autocast(device.type, torch.bfloat16)


class TrainStep:
    """Forward, backward, fused AdamW and moving average, of one network at any K."""

    def __init__(self, net: nn.Module, tree: MergeTree, device: torch.device) -> None:
        self.net, self.tree, self.device = net.train(), tree, device
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=fused)
        self.weights = [p.detach() for p in net.parameters()]
        self.average = [weight.clone() for weight in self.weights]
        self.count = 0

    def batch(self, num_tokens: int, size: int) -> tuple[Tensor, Tensor, Tensor, MergeAssignment]:
        """Latents [B, N, D], labels [B], sample ids [B] and the cut at K, on the device."""
        z = torch.randn(size, self.tree.num_base_tokens, LATENT_DIM, device=self.device)
        labels = torch.randint(NUM_CLASSES, (size,), device=self.device)
        ids = torch.arange(size, device=self.device)
        return z, labels, ids, self.tree.assignment(num_tokens, self.device)

    def __call__(
        self, z: Tensor, labels: Tensor, ids: Tensor, assignment: MergeAssignment
    ) -> Tensor:
        """Train one step on a `batch`; the loss, a scalar on the device."""
        keys = flow.training_keys(0, self.count, ids)
        self.count += 1
        t = flow.sample_timesteps(keys[Purpose.TIMESTEP])
        noise = flow.merged_noise(
            keys[Purpose.NOISE], assignment, LATENT_DIM, flow.NoiseScale.CORRECTED
        )
        with autocast(self.device):
            z = assignment.merge(z)
            v = self.net(flow.interpolate(z, noise, t), t, labels, assignment)
            target = flow.velocity_target(z, noise)
            loss = flow.flow_loss(v, target, assignment, flow.NoiseScale.CORRECTED).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lerp_all_(self.average, self.weights, 1e-4)
        return loss.detach()


def called_again(
    call: Callable[..., Tensor], inputs: list[Tensor]
) -> tuple[Callable[[], object], Tensor]:
    """A stand-in for a CUDA graph on a CPU: fixed memory, and the function itself."""
    out = call(*inputs)
    return lambda: out.copy_(call(*inputs)), out


def sample_batch(
    net: Velocity, tree: MergeTree, num_tokens: int, size: int, device: torch.device
) -> Tensor:
    """Latents of a batch of images, not decoded: [B, N, D]."""
    labels = torch.arange(size, device=device) % NUM_CLASSES
    with autocast(device):
        return sample_latents(
            net, tree, 0, torch.arange(size), labels, NUM_CLASSES, num_tokens, LATENT_DIM, SAMPLER
        )


def seconds_of(
    step: Callable[[], Any], device: torch.device, repeats: int, limit: float
) -> list[float]:
    """Seconds of each of at most `repeats` calls; of 3 or more, also beyond `limit` seconds.

    Two calls before them do not count. On a GPU, events on its own clock, read after the last call.
    """
    on_gpu = device.type == "cuda"
    synchronize = partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    step()
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    count = max(3, min(repeats, int(limit / (time.perf_counter() - start))))
    if not on_gpu:
        times = [time.perf_counter()]
        for _ in range(count):
            step()
            times.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(times)]
    events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]
