"""``lmdeploy-vico options``: what an operator can set. docs/options.md is what it prints with ``--markdown``."""

import argparse
import textwrap
from typing import TYPE_CHECKING

from lmdeploy_vico.options import DECLARATIONS, OVERRIDES_KEY, PREFIX

if TYPE_CHECKING:
    from lmdeploy_vico.cli import Commands

WIDTH = 100  # of the terminal's text
HOW = f"""\
Each option is set in the environment, `{PREFIX}<NAME>`, or with
`--hf-overrides '{{"{OVERRIDES_KEY}": {{"<name>": ...}}}}'`, which wins.
An unknown option or a bad value stops the start, and the error says what is accepted.
"""
HEAD = f"""\
# Options of a server

<!-- Written by `lmdeploy-vico options --markdown`; change lmdeploy_vico/options.py instead. -->

{HOW}
| name | accepted | default | meaning |
|---|---|---|---|
"""
SWITCH = """
`LMDEPLOY_VICO=0` (or `off`) switches the plugin off, its CPU backend included. `LMDEPLOY_VICO=cpu` keeps only that
backend, which runs LMDeploy's own classes where there is no GPU; for InternVL checkpoints these need
`--trust-remote-code`.
"""


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    options = commands.add_parser(
        'options', help='list what an operator can set', description='List the options of a server.'
    )
    options.add_argument('--markdown', action='store_true', help='as the page docs/options.md')
    options.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the options."""
    print(_markdown() if arguments.markdown else _text(), end='')
    return 0


def _markdown() -> str:
    rows = [
        f'| `{name}` | {option.kind.accepted} | {option.default} | {option.meaning} |\n'
        for name, option in DECLARATIONS.items()
    ]
    return HEAD + ''.join(rows) + SWITCH


def _text() -> str:
    paragraphs = [_plain(HOW)]
    for name, option in DECLARATIONS.items():
        lines = [f'{option.kind.accepted} (default: {option.default})', option.meaning]
        paragraphs.append(f'{name}\n' + ''.join(_plain(line, '    ') for line in lines))
    return '\n'.join([*paragraphs, _plain(SWITCH)])


def _plain(text: str, indent: str = '') -> str:
    """The same words without Markdown's quotes of code, in lines of at most ``WIDTH`` characters."""
    words = ' '.join(text.replace('`', '').split())
    return textwrap.fill(words, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False) + '\n'
