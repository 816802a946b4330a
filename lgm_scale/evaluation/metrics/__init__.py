"""Distances and scores of features, and of images beside their originals."""
