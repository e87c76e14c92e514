"""What a client sends, fetched and decoded within bounds: bytes to pictures, in processes that can be ended."""
