#!/bin/sh
# A whole pipeline on two CPU cores: `sh quickstart.sh` on photographs that Python packages ship
# (64x64, minutes), `sh quickstart.sh demo` on Fashion-MNIST (32x32, a quarter of an hour).
# Every command is printed before it runs. A second run skips what is done.
set -eu

step() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

name=${1:-quickstart}
run=runs/$name
if [ "$name" = demo ]; then
    step python data_tools/fashion_mnist.py --train-images 20000 --val-images 2000 \
        --out $run/data/images ${DATA:+--source "$DATA"}
    step python -m eval.reference $run/data/images/train --fashion-mnist \
        --name "training images" --out $run/data/reference.safetensors
else
    step python data_tools/demo_images.py --out $run/data/photos
    step python data_tools/images_to_mds.py $run/data/photos/train --out $run/data/images/train --image-size 64
    step python data_tools/images_to_mds.py $run/data/photos/val --out $run/data/images/val --image-size 64
fi
step python lgm_scale/train.py yamls/$name/tokenizer.yaml
step python data_tools/encode_latents.py --tokenizer $run/tokenizer/bundle \
    --images $run/data/images/train --out $run/data/latents
step python lgm_scale/train.py yamls/$name/dit.yaml
step python eval/sweep.py yamls/$name/sweep.yaml

cat <<END

Done. What you made:
  $run/report/index.html      pictures, numbers and commands on one page
  $run/report/results.json    the numbers
  $run/tokenizer/bundle       the tokenizer
  $run/dit/bundle             the generator, with everything it needs to make images
END
