"""Check a data set of MDS shards: `python data_tools/verify_mds.py FOLDER`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # says so where Python is a wrong one

from lgm_scale.data.preparation.verify import main
from lgm_scale.errors import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(main)
