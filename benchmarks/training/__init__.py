"""Training on a small scale: what it does to a model, with the command line that trains large ones."""
