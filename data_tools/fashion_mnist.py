"""Turn Fashion-MNIST into MDS shards: `python data_tools/fashion_mnist.py --out DST`."""

from lgm_scale.data.preparation.fashion_mnist import main
from lgm_scale.errors import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(main)
