"""First-token throughput by token compression, as in the paper's Table 4: ``lmdeploy-vico bench`` beside the others."""

import sys
from collections.abc import Sequence

from lmdeploy_vico import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lmdeploy-vico bench`` with these arguments; returns its exit status."""
    return cli.main(['bench', *(sys.argv[1:] if argv is None else argv)])
