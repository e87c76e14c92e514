"""Turns many prompts into device batches: preparation, queue, cache and workers. Does not import LMDeploy."""
