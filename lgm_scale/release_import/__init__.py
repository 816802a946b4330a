"""Checkpoints of the LGM authors' release, turned into bundles.

    python -m lgm_scale.release_import tokenizer SRC DST
    python -m lgm_scale.release_import generator SRC DST --tokenizer BUNDLE --latent-stats FILE

`reading` opens files without executing them, `names` maps the release's names of weights to ours
and accounts for every key, `cuts` reads the release's merge dictionary, `tokenizer` and
`generator` put it together. A file that does not fit entirely is refused.
"""
