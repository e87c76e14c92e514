"""What the benchmarks share: timing, comparing, pictures, models, and where a result comes from."""
