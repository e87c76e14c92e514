"""Where the vision side runs, with which weights, and what that leaves for the language model."""
