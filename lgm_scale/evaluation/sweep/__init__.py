"""A generator measured at many token counts and sampler settings."""
