"""Encode images to latents: `composer data_tools/encode_latents.py --images MDS --out MDS ...`."""

from lgm_scale.data.preparation.encode import main
from lgm_scale.errors import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(main)
