"""Timings. Each file is a command that prints one table."""
