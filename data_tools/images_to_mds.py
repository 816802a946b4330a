"""Turn images into MDS shards: `python data_tools/images_to_mds.py SRC --out DST`."""

from lgm_scale.data.preparation.convert import main
from lgm_scale.errors import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(main)
