"""Images to vectors: Inception, DINOv2, and principal components of pixels.

Knows how to run a network to the same bits at any batch size, and nothing of what the vectors are
compared with.
"""
