"""MeanFlow: networks of the average velocity, which go a long way in one evaluation.

    u(z_t, t, r) = (integral of v from t to r) / (r - t)        z_r = z_t + (r - t) u

r >= t is where a step ends; at r = t, u is the velocity v. Along the flow

    v = u - (r - t) du/dt,        du/dt = (dz/dt d/dz + d/dt) u at a fixed r,

a Jacobian-vector product. So a network of u is trained as one of v is: by what is on the right.

Source: MeanFlow (arXiv 2505.13447), here with t = 0 at the noise; improved MeanFlow (arXiv
2512.02012): the loss of v, the network's own v along the flow, guidance inside the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lgm_scale.flow import sample_timesteps
from lgm_scale.randomness import keyed_uniforms

AverageVelocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(z_t, t [B], labels [B], end [B]) -> average velocity from t to end, in the shape of z_t."""


def sample_spans(
    keys: Tensor, t: Tensor, share: float, mean: float, std: float
) -> tuple[Tensor, Tensor]:
    """Start and end: the earlier and the later of t and a second draw of its law.

    All but `share` of the samples keep their t, and end where they start.

    Shapes: keys, t [B] -> t, end [B] in (0, 1).
    """
    other = sample_timesteps(keys, mean, std)
    other = torch.where(keyed_uniforms(keys, 2)[:, 1] < share, other, t)  # word 0 is in `other`
    return torch.minimum(t, other), torch.maximum(t, other)


def adaptively_weighted(error: Tensor, power: float) -> Tensor:
    """Each sample's error over a power of itself, which is taken for a constant: 1 / (e + c)^p.

    The gradient of a sample shrinks with its error. du/dt has a heavy tail at early t, where the
    flow decides what the picture will be.

    Shapes: [B] -> [B]; power 0 changes no bit. Source: MeanFlow (arXiv 2505.13447), c = 0.001.
    """
    return error if power == 0 else error / (error.detach() + 1e-3) ** power


class _LinearTangents(TorchFunctionMode):
    """A linear layer in two products, of its input and of the input's tangent.

    torch computes a third one, of the input with the zeros that are the weights' tangent.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, and a linear layer once for each of the two."""
        if func is F.linear and not kwargs:
            x, rate = forward.unpack_dual(args[0])
            if rate is not None:
                return forward.make_dual(F.linear(x, *args[1:]), F.linear(rate, args[1]))
        return func(*args, **kwargs or {})


def rate_along_flow(
    u: Callable[[Tensor, Tensor], Tensor], z_t: Tensor, t: Tensor, velocity: Tensor
) -> Tensor:
    """du/dt where z_t moves with `velocity`, by forward differentiation, without a gradient.

    Of torch's attention kernels the plain one alone can be differentiated so. Twice a forward pass
    in operations, and attention once more.

    Shapes: z_t and velocity [B, ...], t [B] -> what u gives, [B, ...].
    """
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        _LinearTangents(),
        forward.dual_level(),
    ):
        moving = forward.make_dual(z_t, velocity), forward.make_dual(t, torch.ones_like(t))
        rate = forward.unpack_dual(u(*moving)).tangent
    return rate


def mean_flow_velocity(
    net: AverageVelocity,
    z_t: Tensor,
    span: tuple[Tensor, Tensor],
    labels: Tensor,
    null_label: int,
    target: Tensor,
    guidance: Tensor | float,
    spread: Callable[[Tensor], Tensor] = lambda times: times,
) -> tuple[Tensor, Tensor]:
    """Velocity as the network's average velocity implies it, and what it is compared with.

    Guidance w is learned: the target is v + (1 - 1 / w) (v_cond - v_null), of the network's own
    guided velocity v_cond, whose mean is v_null + w (v - v_null).

    Shapes: z_t and target [B, ...], span and labels [B]; guidance is a number of 1 or more, or
    broadcasts to z_t -> [B, ...] twice. The gradient is that of u alone, as published. Of samples
    that lie packed, z_t and target are [T, D]; `spread` is then [B] -> [T], each token's time, and
    the network sees the row once, or twice in a row.
    """
    t, end = span
    with torch.no_grad():
        both = torch.cat((labels, torch.full_like(labels, null_label)))
        v, v_null = net(torch.cat((z_t, z_t)), torch.cat((t, t)), both, torch.cat((t, t))).chunk(2)
        target = target + (1 - 1 / guidance) * (v - v_null).to(target.dtype)
    rate = rate_along_flow(lambda z, s: net(z, s, labels, end), z_t, t, v.to(z_t.dtype))
    # Weights that autocast has cast without a gradient are kept for it, and would have none.
    torch.clear_autocast_cache()
    length = spread(end - t).view(-1, *[1] * (z_t.ndim - 1))
    return net(z_t, t, labels, end) - length * rate, target
