"""lgm_scale: variable-length image generation with learnable global merging (LGM).

Import the part you need from its own module; see the folder map in README.md. The exceptions are
the pipelines: `from lgm_scale import load_pipeline`, or `LGMPipeline`, `ELITPipeline`.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"

# Before the first import that would fail with a traceback: a command was started without the
# project's environment.
if sys.version_info < (3, 10) or find_spec("pydantic") is None:
    _found = ".".join(map(str, sys.version_info[:2]))
    print(
        f"error: Python {_found} of {sys.executable} is not this project's: it needs Python 3.10 "
        "to 3.12 and its packages; in the checkout, `source .venv/bin/activate` after `make "
        "install`, or `pip install -e .` into an environment of your own",
        file=sys.stderr,
    )
    raise SystemExit(2)

if "torch" not in sys.modules:  # OpenMP reads it once. Threads that spin stall a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def __getattr__(name: str) -> Any:
    """Load a pipeline, and torch with it, only when somebody asks for it."""
    if name == "load_pipeline":
        return import_module("lgm_scale.pipeline").load_pipeline
    if name.endswith("Pipeline"):
        for family in import_module("lgm_scale.families.generator").generator_families().values():
            if family.pipeline_class.endswith(f":{name}"):
                return family.pipeline()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
