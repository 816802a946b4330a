"""Thin Composer models, the length schedule, EMA and callbacks."""
