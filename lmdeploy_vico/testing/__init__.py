"""Tiny checkpoints with the real layout, for tests and demonstrations."""
