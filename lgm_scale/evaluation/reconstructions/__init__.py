"""Validation images through a tokenizer at every K."""
