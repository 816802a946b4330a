"""lgm_scale: variable-length image generation with learnable global merging (LGM).

Import the part you need from its own module; see the folder map in README.md. The one exception
is `from lgm_scale import LGMPipeline`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the pipeline, and torch with it, only when somebody asks for it."""
    if name == "LGMPipeline":
        return import_module("lgm_scale.pipeline").LGMPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
