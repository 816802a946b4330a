"""Reference statistics and features: reading every published form, and making our own."""
