"""Commands that write something: checkpoints, the reader, documents with questions."""
