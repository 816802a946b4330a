"""Parameters as the vectors that FSDP cuts: the same numbers, names and shapes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lgm_scale.parallel.shards import flatten_parameters, local_shards


class Net(nn.Module):
    """A table of its own, a tied matrix, a convolution with a parametrization, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 3, 4))
        self.embed = nn.Embedding(5, 4)
        self.conv = spectral_norm(nn.Conv1d(3, 3, 3, padding=1))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.out = nn.Linear(4, 5)
        self.out.weight = self.embed.weight

    def forward(self, labels: Tensor) -> Tensor:
        return self.out(self.frozen(self.conv(self.embed(labels) + self.positions)))


def test_vectors_compute_the_same_bits():
    torch.manual_seed(0)
    plain = Net()
    flat = copy.deepcopy(plain)
    flatten_parameters(flat)
    labels = torch.tensor([[0, 1, 2], [4, 3, 2]])
    outputs = [net(labels) for net in (plain, flat)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    expected, found = dict(plain.named_parameters()), dict(flat.named_parameters())
    assert list(found) == list(expected)  # the tied matrix once, as before
    for name, p in found.items():
        assert p.ndim == 1
        assert p.requires_grad == expected[name].requires_grad == (not name.startswith("frozen"))
        if p.requires_grad:
            assert torch.equal(p.grad, expected[name].grad.flatten())  # type: ignore[union-attr,arg-type]
    assert flat.positions.shape == (1, 3, 4)


def test_shards_have_the_shapes_of_before():
    net = Net()
    expected = {name: tuple(p.shape) for name, p in net.named_parameters()}
    flatten_parameters(net)
    shards = local_shards(net, torch.optim.AdamW(net.parameters()))
    assert {shard.name: shard.shape for shard in shards} == expected
    assert all((shard.start, shard.numel) == (0, shard.weight().numel()) for shard in shards)
