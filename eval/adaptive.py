"""What choosing K per image saves: the mean K at a target PSNR, against a fixed K.

In an installed package: `python -m lgm_scale.evaluation.commands.adaptive`.
"""

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands.adaptive import main

if __name__ == "__main__":
    exit_on_user_error(main)
