"""The command `preflight` of lgm_scale.evaluation, as the repository calls it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # says so where Python is a wrong one

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands.preflight import main

if __name__ == "__main__":
    exit_on_user_error(main)
