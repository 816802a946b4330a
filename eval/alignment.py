"""How much the latents of one image agree across token lengths, and how alike merged tokens are.

In an installed package: `python -m lgm_scale.evaluation.commands.alignment`.
"""

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands.alignment import main

if __name__ == "__main__":
    exit_on_user_error(main)
