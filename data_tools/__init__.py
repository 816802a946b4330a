"""Commands that make data sets: demo images, MDS shards, latents."""
