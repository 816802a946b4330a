"""From images to the MDS shards that training reads: convert, encode, verify."""
