"""The names of the implementations. A file of its own, so that reading options loads neither torch nor Triton."""

AUTO, TRITON, TORCH = CHOICES = ('auto', 'triton', 'torch')
