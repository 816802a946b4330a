"""The evaluator: features, metrics, references, sweeps over token lengths, and their report."""
