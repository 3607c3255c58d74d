"""From source files to shards and label tables."""
