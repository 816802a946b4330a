"""Check a data set of MDS shards: `python data_tools/verify_mds.py FOLDER`."""

from lgm_scale.data.preparation.verify import main
from lgm_scale.errors import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(main)
