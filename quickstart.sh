#!/bin/sh
# The whole pipeline on demo photographs: 64x64 pixels, two CPU cores, a few minutes.
# Every command is printed before it runs. A second run skips what is done.
set -eu

step() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

run=runs/quickstart
step python data_tools/demo_images.py --out $run/data/photos
step python data_tools/images_to_mds.py $run/data/photos/train --out $run/data/images/train --image-size 64
step python data_tools/images_to_mds.py $run/data/photos/val --out $run/data/images/val --image-size 64
step python lgm_scale/train.py yamls/quickstart/tokenizer.yaml
step python data_tools/encode_latents.py --tokenizer $run/tokenizer/bundle \
    --images $run/data/images/train --out $run/data/latents
step python lgm_scale/train.py yamls/quickstart/dit.yaml
step python eval/sweep.py yamls/quickstart/sweep.yaml

cat <<END

Done. What you made:
  $run/report/index.html      pictures, numbers and commands on one page
  $run/report/results.json    the numbers
  $run/tokenizer/bundle       the tokenizer
  $run/dit/bundle             the generator, with everything it needs to make images
END
