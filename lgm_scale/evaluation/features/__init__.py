"""Images to vectors: Inception, DINOv2, Fashion-MNIST's classifier, principal components of pixels.

Knows how to run a network to the same bits at any batch size, and nothing of what the vectors are
compared with.
"""
