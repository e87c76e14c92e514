"""``lmdeploy-vico metrics``: what a server counts. docs/metrics.md is what it prints with ``--markdown``."""

import argparse
import textwrap
from typing import TYPE_CHECKING

from lmdeploy_vico.stage.metrics import Declared, stage_metrics

if TYPE_CHECKING:
    from lmdeploy_vico.cli import Commands

WIDTH = 100  # of the terminal's text
INDENT = ' ' * 4
HEAD = """\
# Metrics

<!-- Written by `lmdeploy-vico metrics --markdown`; change lmdeploy_vico/stage/metrics.py instead. -->

`GET /metrics` of the API server carries these beside LMDeploy's own. Those that end in `_seconds` and `_batch` are
histograms. [monitoring.md](monitoring.md) says what to make of them.

| metric | meaning |
|---|---|
"""


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    metrics = commands.add_parser(
        'metrics', help='list what a server counts', description="List the plugin's metrics of a server."
    )
    metrics.add_argument('--markdown', action='store_true', help='as the page docs/metrics.md')
    metrics.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the metrics."""
    declared = stage_metrics().declared
    if arguments.markdown:
        print(HEAD + ''.join(f'| `{_series(one)}` | {one.meaning} |\n' for one in declared), end='')
    else:
        print('\n'.join(f'{_series(one)}\n{_indented(one.meaning)}' for one in declared))
    return 0


def _series(metric: Declared) -> str:
    """The metric's name with its labels and their values."""
    labels = [f'{name}="{value}"' for name, values in metric.labels.items() for value in values]
    return metric.name + (f'{{{" or ".join(labels)}}}' if labels else '')


def _indented(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
