"""One folder per family of models; nothing outside of them knows what is inside."""
