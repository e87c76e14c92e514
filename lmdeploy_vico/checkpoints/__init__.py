"""A checkpoint on disk: names and shapes of its tensors, its shards, and random ones."""
