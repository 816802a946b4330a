"""Imported once, by the server from which `rank_processes` forks ranks."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lgm_scale.build
import lgm_scale.checkpoint.run
import lgm_scale.config_rules
import lgm_scale.train  # noqa: F401
