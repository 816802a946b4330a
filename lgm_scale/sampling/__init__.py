"""From noise to a sample: the settings and the solver's loop, the same for every family."""
