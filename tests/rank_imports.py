"""Imported once, by the server from which `rank_processes` forks ranks."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util

if importlib.util.find_spec("deepspeed"):
    pass
