"""What is measured, counted and compared. ``python -m benchmarks --help`` lists the commands."""

from pathlib import Path

RESULTS = Path(__file__).parent / 'results'
