"""Check this evaluator against published numbers: ADM's sample batch scored with ADM's reference.

In an installed package: `python -m lgm_scale.evaluation.commands.conformance`.
"""

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands.conformance import main

if __name__ == "__main__":
    exit_on_user_error(main)
