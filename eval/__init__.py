"""Commands that measure: the sweep over lengths, reconstructions, the report."""
