"""``lmdeploy-vico documents``: render pictures with print, shapes and photographs, and questions about them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy_vico.cli.errors import CommandError

if TYPE_CHECKING:
    from lmdeploy_vico.cli import Commands

DESCRIPTION = """\
Render documents, and write questions about them into a tab-separated FILE that `lmdeploy-vico eval` reads: codes beside
key letters in fine and medium print, shapes in colours, parts of photographs that come with scikit-image. A
picture has one or several tiles. The same options give the same file.

The codes are arbitrary digits, and none of them is ever printed in training. The photographs are those that the reader
was trained on: answers about them are no evidence of quality.
"""


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    parser = commands.add_parser(
        'documents',
        help='render documents with questions for eval',
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('file', metavar='FILE.tsv', type=Path, help='where to; it is overwritten')
    parser.add_argument('--seed', type=int, default=0, help='of what is drawn, from 0 to 999 (default: %(default)s)')
    parser.add_argument('--count', type=int, default=500, help='of questions (default: %(default)s)')
    parser.add_argument(
        '--kinds', nargs='+', metavar='KIND', help='of tiles: fine, medium, shape, photo (default: all)'
    )
    parser.add_argument(
        '--tiles',
        nargs='+',
        type=int,
        metavar='N',
        default=[1, 3, 5],
        help='how many tiles the pictures have, in turn: 1 to 6 (default: 1 3 5)',
    )
    parser.add_argument(
        '--separate', action='store_true', help='show the tiles of a picture as pictures of their own, in one request'
    )
    parser.add_argument(
        '--per-kind',
        type=int,
        metavar='N',
        help="at most N questions about a picture's tiles of one kind (default: all)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the questions.

    Raises:
        CommandError: an option is out of range, the file cannot be written, or a package is missing.
    """
    from lmdeploy_vico.reader.documents.export import write_questions
    from lmdeploy_vico.reader.documents.page import GRIDS, KINDS

    kinds = arguments.kinds or KINDS
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise CommandError(f'--kinds: {unknown[0]!r} is none of {", ".join(KINDS)}.')
    if wrong := [count for count in arguments.tiles if count not in GRIDS]:
        raise CommandError(f'--tiles: {wrong[0]} is none of {", ".join(map(str, GRIDS))}.')
    if arguments.count < 1:
        raise CommandError('--count: at least 1 question.')
    if arguments.per_kind is not None and arguments.per_kind < 1:
        raise CommandError('--per-kind: at least 1 question.')
    try:
        pictures = write_questions(
            arguments.file,
            arguments.seed,
            arguments.count,
            kinds,
            arguments.tiles,
            arguments.separate,
            arguments.per_kind,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f'{arguments.file} cannot be written: {error.strerror or error}') from error
    except ImportError as error:
        raise CommandError(f"{error.name} is missing: pip install 'lmdeploy-vico[reader]'") from error
    print(f'{arguments.file}: {arguments.count} questions about {pictures} pictures')
    return 0
