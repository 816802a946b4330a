"""Measure one generator at many token counts and sampler settings, and write a report.

In an installed package: `python -m lgm_scale.evaluation.commands.sweep`.
"""

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands.sweep import main

if __name__ == "__main__":
    exit_on_user_error(main)
