"""lgm_scale: variable-length image generation with learnable global merging (LGM).

Import the part you need from its own module; see the folder map in README.md.
"""

__version__ = "0.1.0"
