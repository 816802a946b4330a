"""Feature spaces: what maps 8-bit images to vectors."""
