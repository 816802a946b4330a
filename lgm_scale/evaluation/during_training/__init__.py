"""Looking at the average of the weights while it is trained: sweeps, reconstructions, pictures."""
