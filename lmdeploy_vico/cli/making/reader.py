"""``lmdeploy-vico reader``: write out the model that comes with the plugin and reads, or train it again."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy_vico.cli.errors import CommandError
from lmdeploy_vico.reader import ReaderError

if TYPE_CHECKING:
    from lmdeploy_vico.cli import Commands

DESCRIPTION = """\
Write the reader into DIR: a ViCO model of a few megabytes that comes with this package. It reads codes beside key
letters (`lmdeploy-vico documents` renders such pictures), names shapes and colours, and knows eleven photographs of
scikit-image by heart. It answers the questions that it was trained on, word for word, and no others:

  Code of A?   Which shape?   Which colour?   Which photograph?

Afterwards:

  lmdeploy serve api_server DIR --max-batch-size 32 --num-gpu-blocks 4096

With --train, train it again from nothing, in DIR, on two processes of the CPU: about an hour and a half on two quiet
cores. A run that was interrupted goes on where it stopped when the command is repeated. The checkpoint is DIR/reader.
"""


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    parser = commands.add_parser(
        'reader',
        help='write out a small model that reads',
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('directory', metavar='DIR', type=Path, help='where to; an empty or new folder')
    parser.add_argument('--train', action='store_true', help='train it again (needs the extras reader and train)')
    parser.add_argument('--seed', type=int, help='with --train: of weights and documents (default: 0)')
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the reader or train it; print where it is.

    Raises:
        CommandError: the folder is not empty, a package is missing, or training failed.
    """
    if arguments.seed is not None and not arguments.train:
        raise CommandError('--seed goes with --train: the model that comes with the package is there already.')
    if arguments.seed is not None and arguments.seed < 0:
        raise CommandError('--seed must be 0 or more.')
    try:
        path = _train(arguments) if arguments.train else _write(arguments)
    except ReaderError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f'{arguments.directory} cannot be written: {error.strerror or error}') from error
    print(path)
    return 0


def _write(arguments: argparse.Namespace) -> Path:
    from lmdeploy_vico.reader.shipped import write_reader

    write_reader(arguments.directory)
    return arguments.directory


def _train(arguments: argparse.Namespace) -> Path:
    try:
        from rich.console import Console

        from lmdeploy_vico.reader.recipe import Recipe, Settings
    except ImportError as error:
        raise CommandError(f"{error.name} is missing: pip install 'lmdeploy-vico[reader,train]'") from error
    return Recipe(arguments.directory, Settings(), arguments.seed or 0, Console(stderr=True)).make()
