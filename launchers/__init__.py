"""Commands that start runs on clusters."""
