"""Guide a generator by another that is worse at the same: autoguidance in its published form.

    python -m benchmarks.autoguidance SWEEP.yaml WEAK_BUNDLE [key=value ...]

The sampler's own autoguidance has one network, made weak by fewer tokens. Here the weak branch is
the generator of a second bundle (smaller, or trained for less) with the class and at as many
tokens, where plain guidance has the network without the class. Everything else is the sweep's.

Source: Karras et al. 2024, arXiv 2406.02507.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.evaluation.engine.parts import join_ranks
from lgm_scale.evaluation.sweep.measure import Sweep
from lgm_scale.evaluation.sweep.rules import load_sweep
from lgm_scale.families.lgm.bundle import GENERATOR_NAME, LGMBundle, load_lgm_bundle
from lgm_scale.families.lgm.pipeline import LGMPipeline
from lgm_scale.families.tokenizer.config import RECONSTRUCTION_FILES
from lgm_scale.merging.tree import MergeAssignment
from lgm_scale.sampling.config import SamplerConfig


class AutoguidedPipeline(LGMPipeline):
    """A pipeline whose guidance leads away from another generator, not from the missing class."""

    def __init__(self, strong: LGMBundle, weak: LGMBundle) -> None:
        super().__init__(strong)
        self.weak = weak
        self._velocity = self.both

    def both(self, z_t: Tensor, t: Tensor, labels: Tensor, assignment: MergeAssignment) -> Tensor:
        """Velocities of both branches: [2 B, K, D]; without guidance the strong one's alone."""
        if not (labels == self.bundle.net.null_label).any():
            return self.bundle.velocity(z_t, t, labels, assignment)
        # Guidance asks for both in one batch: with classes first, then without.
        (z_strong, z_weak), (t_strong, t_weak) = z_t.chunk(2), t.chunk(2)
        classes = labels[: len(z_strong)]
        strong = self.bundle.velocity(z_strong, t_strong, classes, assignment)
        return torch.cat((strong, self.weak.velocity(z_weak, t_weak, classes, assignment)))

    @override
    def check(self, config: SamplerConfig, num_tokens: int) -> None:
        super().check(config, num_tokens)
        if config.nested:
            raise ConfigError(
                "cells: uncond_num_tokens and length_schedule are for a network that is its own "
                "weak branch; remove them"
            )

    @override
    def image_flops(self, config: SamplerConfig, num_tokens: int) -> int:
        guided = sum(config.guided(t) for _, t in config.evaluations())
        other = self.weak.net.flops(num_tokens) - self.bundle.net.flops(num_tokens)
        return super().image_flops(config, num_tokens) + guided * other


def main() -> None:
    """Load both, check that they speak of the same latents, and measure as the sweep does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoguidance")
    parser.add_argument("sweep", help="YAML of a sweep, whose bundle is the strong branch")
    parser.add_argument("weak", type=Path, help="bundle whose generator is the weak branch")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the sweep")
    args = parser.parse_intermixed_args(sys.argv[1:])
    config = load_sweep(args.sweep, args.overrides)
    strong, weak = load_lgm_bundle(config.bundle), load_lgm_bundle(args.weak)
    files, theirs = strong.info["files"], weak.info["files"]
    other = [name for name in files if name != GENERATOR_NAME and theirs.get(name) != files[name]]
    if other:
        raise ConfigError(
            f"{args.weak}: {', '.join(other)} differ from those of {config.bundle}; give a "
            "generator trained on the same latents"
        )
    pipe = AutoguidedPipeline(strong, weak)
    tokenizer = {name: files[name] for name in RECONSTRUCTION_FILES}
    join_ranks()
    Sweep(config, pipe, files | {"weak": theirs[GENERATOR_NAME]}, tokenizer).run({})


if __name__ == "__main__":
    exit_on_user_error(main)
