"""Devices of the tests for a GPU: each test is one for the CPU, which runs everywhere, and one for
CUDA, which is skipped without it. Nothing in this folder has ever run on CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before the first product: cuBLAS gives equal bits in each run only with a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test runs. Its CPU form shows that the test itself works, and how far off float32 is
    without a GPU."""
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Products of float32 in float32: torch's default is TF32 for convolutions."""
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    yield
    for kind, value in zip(kinds, before, strict=True):
        kind.allow_tf32 = value
