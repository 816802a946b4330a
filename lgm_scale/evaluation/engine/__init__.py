"""Work over images in chunks that any number of processes share."""
