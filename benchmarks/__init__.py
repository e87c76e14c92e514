"""What is measured, counted and compared. ``python -m benchmarks --help`` lists the commands."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
