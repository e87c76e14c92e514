"""The operations under kernels/ and the whole router, against torch, LMDeploy 0.18 and what the hardware allows.

pytest-benchmark runs benchmarks/kernels/operations.py, which says what is measured. Further arguments go to pytest:

    python -m benchmarks kernels                                     # prints the table
    python -m benchmarks kernels --benchmark-json=results.json       # and keeps it, with device, versions and commit
    python -m benchmarks kernels -k residual_norm                    # one operation
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest

OPERATIONS = Path(__file__).with_name('operations.py')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, more = parser.parse_known_args(argv)
    options = ['-q', '-o', f'python_files={OPERATIONS.name}', '--benchmark-columns=median,iqr,rounds']
    return int(pytest.main([str(OPERATIONS), *options, *more]))
