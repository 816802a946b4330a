"""Which files the evaluation needs, where it looks for them, and what each unlocks.

In an installed package: `python -m lgm_scale.evaluation.commands.preflight`.
"""

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands.preflight import main

if __name__ == "__main__":
    exit_on_user_error(main)
