"""Make a reference: statistics and features that samples are compared with.

In an installed package: `python -m lgm_scale.evaluation.commands.reference`.
"""

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands.reference import main

if __name__ == "__main__":
    exit_on_user_error(main)
