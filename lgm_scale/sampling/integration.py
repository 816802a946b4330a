"""The solver's loop, the same for every family of generators: from noise (t = 0) to data (t = 1).

What a state is, and what its velocity, the loop does not know. The velocity is asked for at a time
and a length, K; guided and unguided times are told apart by whoever answers.

Source: Euler and Heun's method; MeanFlow (arXiv 2505.13447); growing length is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor

from lgm_scale.sampling.config import SamplerConfig, Solver


def integrate(
    z_t: Tensor,
    velocity: Callable[..., Tensor],
    config: SamplerConfig,
    num_tokens: int,
    begin_step: Callable[[Tensor, float, int], Tensor] | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Integrate the ODE over the whole grid. Both evaluations of a step are at one length.

    `z_t` is the state at t = 0, at the length of the first step. `velocity` is (state, t, K) ->
    float32, and under `mean_flow` gets the end of the step besides; `begin_step` is (state, t, K)
    -> the state at K, before a step, or None: a state fits every K.

    Shapes: any -> the same, or what `begin_step` made of it.
    """
    for t, t_next in itertools.pairwise(config.grid()):
        length = config.length_at(t, num_tokens)
        if begin_step is not None:
            z_t = begin_step(z_t, t, length)
        end = (t_next,) if config.solver is Solver.MEAN_FLOW else ()
        v = velocity(z_t, t, length, *end)
        if config.corrects(t_next):
            v = (v + velocity(z_t + (t_next - t) * v, t_next, length)) / 2
        z_t = z_t + (t_next - t) * v
        if on_step is not None:
            on_step()
    return z_t
