"""Imported once, by the server from which ranks and commands are forked (`rank_processes`)."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import gc
import importlib.util

import pytest  # noqa: F401  (every child imports its parent's main module)
from composer import algorithms  # noqa: F401  (each trainer asks for its classes)

import lgm_scale.build
import lgm_scale.checkpoint.run
import lgm_scale.data.preparation.encode
import lgm_scale.evaluation.commands.reconstruct
import lgm_scale.evaluation.commands.sweep
import lgm_scale.evaluation.report.writing
import lgm_scale.evaluation.sweep.measure
import lgm_scale.families.elit.family
import lgm_scale.families.elit.pipeline
import lgm_scale.families.lgm.family
import lgm_scale.families.lgm.pipeline
import lgm_scale.families.tokenizer.training
import lgm_scale.pipeline
import lgm_scale.planning.plan
import lgm_scale.sample
import lgm_scale.train

if importlib.util.find_spec("deepspeed"):
    import torch._inductor.compile_fx  # noqa: F401  # its start compiles one of its optimizers

    import lgm_scale.parallel.deepspeed  # noqa: F401

gc.freeze()  # each collection of each child would look through all this
