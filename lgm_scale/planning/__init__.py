"""What a run would cost: state from shapes, and the real training step simulated on one CPU."""
