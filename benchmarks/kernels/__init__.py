"""The Triton kernels: their time, what they take of a GPU, and how the router rounds."""
