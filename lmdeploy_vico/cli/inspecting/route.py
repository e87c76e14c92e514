"""``lmdeploy-vico route``: show which tiles of pictures a checkpoint's router compresses."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy_vico.choices import parse_compression, typed
from lmdeploy_vico.cli.errors import CommandError, require_checkpoint
from lmdeploy_vico.config import UnsupportedCheckpointError, VicoConfig
from lmdeploy_vico.inspection import InspectionError

if TYPE_CHECKING:
    from rich.console import Console

    from lmdeploy_vico.cli import Commands
    from lmdeploy_vico.inspection.routed import Routed

SHEET = 'sheet.png'
LOG_WIDTH = 120  # of the table, where no terminal says how wide it is
DESCRIPTION = """\
Show what a checkpoint's router does with pictures: the grid of tiles that each is cut into, the score of each tile (the
probability that compressing it loses nothing), which tiles get 64 visual tokens and which keep 256. No server and no
language model are needed, only the vision side of the checkpoint.

With -o, each picture is drawn with its grid: compressed tiles are shaded, scores stand in the tiles, the thumbnail
beside them; several pictures come on a contact sheet too, sheet.png.

With --json, standard output is one object: images: [{path, grid: [columns, rows], tiles: [{score, tokens}], tokens,
tokens_full}], tiles row by row, the thumbnail last.
"""


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    parser = commands.add_parser(
        'route',
        help='show which tiles of pictures are compressed',
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE', type=Path, help='a picture, or a folder: all pictures under it'
    )
    parser.add_argument('--model', required=True, metavar='DIR', type=Path, help='a ViCO checkpoint')
    parser.add_argument('-o', '--output', metavar='DIR', type=Path, help='where to draw; made if need be')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    parser.add_argument(
        '--compression',
        default='auto',
        help="auto (the router's thresholds), none, all, or the share of tiles to compress (default: %(default)s)",
    )
    parser.add_argument(
        '--together',
        action='store_true',
        help='as pictures of one prompt, whose tiles are compared with each other (default: each by itself)',
    )
    parser.add_argument('--device', help='of torch (default: the first GPU, or the CPU without one)')
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Route, draw and print.

    Raises:
        CommandError: a picture or a checkpoint cannot be read, an option is wrong, or a package is missing.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise CommandError(f'{error.name} is missing; in a checkout of the plugin: pip install ".[demo]"') from error
    console = Console(stderr=True, highlight=False)
    try:
        routed = _routed(arguments, console)
        drawn = _draw(routed, arguments.output) if arguments.output else []
    except (InspectionError, UnsupportedCheckpointError, ValueError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f'{error.filename or arguments.output}: {error.strerror or error}') from error
    if arguments.json:
        print(json.dumps({'images': [one.as_json() for one in routed]}, indent=2))
    else:
        _print(routed, drawn)
    return 0


def _routed(arguments: argparse.Namespace, console: 'Console') -> 'list[Routed]':
    from rich.progress import Progress

    from lmdeploy_vico.inspection.pictures import PictureReader, find
    from lmdeploy_vico.inspection.routed import device_of, route_pictures
    from lmdeploy_vico.vision.encoder import VisionEncoder

    compression = parse_compression(typed(arguments.compression), '--compression')
    require_checkpoint(arguments.model)
    paths = find(arguments.images)
    VicoConfig.from_pretrained(arguments.model)  # what is wrong is said before anything is loaded
    encoder = VisionEncoder.from_pretrained(arguments.model, device_of(arguments.device))
    with PictureReader() as reader, Progress(console=console, transient=True) as progress:
        pictures = ((str(path), reader.read(path)) for path in paths)
        task = progress.add_task('routing', total=1 if arguments.together else len(paths))
        return route_pictures(encoder, pictures, compression, arguments.together, lambda: progress.advance(task))


def _draw(routed: 'Sequence[Routed]', folder: Path) -> list[Path]:
    from lmdeploy_vico.inspection.drawing import draw, sheet

    folder.mkdir(parents=True, exist_ok=True)
    drawings, written = [draw(one) for one in routed], []
    for number, (one, drawing) in enumerate(zip(routed, drawings, strict=True), 1):
        written.append(folder / f'{number:03}-{Path(one.name).stem}.png')
        drawing.save(written[-1])
    if len(drawings) > 1:
        written.append(folder / SHEET)
        sheet(drawings).save(written[-1])
    return written


def _print(routed: 'Sequence[Routed]', drawn: Sequence[Path]) -> None:
    from rich.console import Console

    from lmdeploy_vico.inspection.report import as_table, summary

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(as_table(routed))
    console.print(summary(routed), soft_wrap=True)
    for path in drawn:
        console.print(str(path), markup=False, soft_wrap=True)
