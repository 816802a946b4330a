#!/bin/sh
# The whole pipeline on Fashion-MNIST: 32x32 pixels, ten classes, two CPU cores, a quarter of an hour.
# Every command is printed before it runs. A second run skips what is done.
#
#   sh demo.sh               with the files of `apt-get install dataset-fashion-mnist`
#   sh demo.sh --download    get the four files first (30 MB), with their published checksums
#   sh demo.sh --source DIR  the four files are in DIR
set -eu

step() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

run=runs/demo
step python data_tools/fashion_mnist.py --out $run/data "$@"
step composer lgm_scale/train.py yamls/demo/tokenizer.yaml
step composer data_tools/encode_latents.py --tokenizer $run/tokenizer/bundle \
    --images $run/data/train --out $run/data/latents
step composer lgm_scale/train.py yamls/demo/dit.yaml
test -f $run/reference.safetensors || step python -m eval.reference $run/data/train \
    --fashion-mnist --name "training images" --out $run/reference.safetensors
step composer eval/sweep.py yamls/demo/sweep.yaml

cat <<END

Done. What you made:
  $run/report/index.html      pictures, numbers and commands on one page
  $run/report/results.json    the numbers
  $run/tokenizer/bundle       the tokenizer
  $run/dit/bundle             the generator, with everything it needs to make images
END
