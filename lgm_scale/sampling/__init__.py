"""From noise to latents: one solver for both families of generators.

config.py       what can be set, and what it costs
integration.py  the solver's loop
guidance.py     merged tokens: strong and weak branch, at one length or at two
solver.py       merged tokens: noise, and the trajectory, at one length or growing
spatial.py      states on a grid: noise, guidance and trajectory
"""

from lgm_scale.sampling.config import CFGRescale, Guidance, SamplerConfig, Solver
from lgm_scale.sampling.guidance import Velocity, coarse_guided_velocity, guided_velocity
from lgm_scale.sampling.solver import initial_noise, sample, sample_latents
from lgm_scale.sampling.spatial import initial_state_noise, sample_state

__all__ = [
    "CFGRescale",
    "Guidance",
    "SamplerConfig",
    "Solver",
    "Velocity",
    "coarse_guided_velocity",
    "guided_velocity",
    "initial_noise",
    "initial_state_noise",
    "sample",
    "sample_latents",
    "sample_state",
]
