"""Checkpoints on disk: the names and shapes of their tensors, their files, and random checkpoints."""
