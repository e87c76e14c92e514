"""Training data: InternVL's JSONL and meta files, conversations as they are served, samples and batches of them."""
