"""Parallelism as free functions applied to finished modules."""
