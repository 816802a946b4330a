"""lgm_scale: variable-length image generation with learnable global merging (LGM).

Import the part you need from its own module; see the folder map in README.md. The exceptions are
the pipelines: `from lgm_scale import load_pipeline`, or `LGMPipeline`, `SpatialPipeline`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_PIPELINES = {
    "LGMPipeline": "lgm_scale.families.lgm.pipeline",
    "SpatialPipeline": "lgm_scale.families.elit.pipeline",
    "load_pipeline": "lgm_scale.pipeline",
}


def __getattr__(name: str) -> Any:
    """Load a pipeline, and torch with it, only when somebody asks for it."""
    if name in _PIPELINES:
        return getattr(import_module(_PIPELINES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
