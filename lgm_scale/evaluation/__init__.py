"""The evaluator: how good a generator is, at which number of tokens, for how many operations.

From the top down; a room imports those below it:

    commands/         command lines
    report/           pictures, tables and page of finished sweeps
    sweep/            one generator at many token counts and sampler settings
    reconstructions/  validation images through a tokenizer at every K
    metrics/          which metrics there are, and their formulas
    references/       what images are compared with
    features/         images to vectors
    images            stored images by index
    engine/           chunks, sums and rows that any number of processes share
"""
