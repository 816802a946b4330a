"""From noise to latents: solvers, guidance, and the two methods built on nested cuts.

config.py    what can be set, and what it costs
guidance.py  conditional and unconditional branch, at one length or at two
solver.py    noise, and the trajectory from noise to data, at one length or growing
"""

from lgm_scale.sampling.config import CFGRescale, SamplerConfig, Solver
from lgm_scale.sampling.guidance import Velocity, coarse_guided_velocity, guided_velocity
from lgm_scale.sampling.solver import initial_noise, sample, sample_latents

__all__ = [
    "CFGRescale",
    "SamplerConfig",
    "Solver",
    "Velocity",
    "coarse_guided_velocity",
    "guided_velocity",
    "initial_noise",
    "sample",
    "sample_latents",
]
