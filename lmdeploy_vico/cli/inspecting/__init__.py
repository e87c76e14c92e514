"""Commands that look at what the router does."""
