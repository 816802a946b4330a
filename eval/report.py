"""Pictures, tables and page of a finished sweep, from what it stored; or of several, compared.

In an installed package: `python -m lgm_scale.evaluation.commands.report`.
"""

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands.report import main

if __name__ == "__main__":
    exit_on_user_error(main)
