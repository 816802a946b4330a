"""ELIT and SiT: generators on a grid, whose middle runs on K latents."""
