"""The command `report` of lgm_scale.evaluation, as the repository calls it."""

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands.report import main

if __name__ == "__main__":
    exit_on_user_error(main)
