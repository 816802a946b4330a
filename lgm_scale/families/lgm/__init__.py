"""LGM's generator: a diffusion transformer on merged tokens (MergeDiT)."""
