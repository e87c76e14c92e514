"""Where the vision side runs, which weights it loads, and how much memory that leaves for the language model."""
