"""LGM's tokenizer: images to latents whose number K is changed by merging."""
