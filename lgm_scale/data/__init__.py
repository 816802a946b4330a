"""Data sets in MDS shards: images, latents and a synthetic twin of each."""
