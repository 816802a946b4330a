"""Checkpoints of the authors of LGM and of ELIT, turned into bundles.

    python -m lgm_scale.release_import tokenizer SRC DST
    python -m lgm_scale.release_import generator SRC DST --tokenizer BUNDLE --latent-stats FILE
    python -m lgm_scale.release_import elit SRC DST --vae FOLDER

`reading` opens files without executing them, `names` maps names of weights to ours and accounts for
every key, the `release` module of each family puts it together. A file that does not fit entirely
is refused.
"""
