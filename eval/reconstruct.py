"""Validation images through the tokenizer at each K: PSNR, SSIM, LPIPS and rFID.

In an installed package: `python -m lgm_scale.evaluation.commands.reconstruct`.
"""

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands.reconstruct import main

if __name__ == "__main__":
    exit_on_user_error(main)
