"""``lmdeploy-vico demo``: serve a checkpoint with the unmodified LMDeploy command and show what its router does."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy_vico.cli.errors import CommandError, require_checkpoint
from lmdeploy_vico.launch import ApiServer, ServerError
from lmdeploy_vico.reader import ReaderError

if TYPE_CHECKING:
    from rich.console import Console

    from lmdeploy_vico.cli import Commands
    from lmdeploy_vico.reader.demo import Exhibit

WIDTH = 110  # columns
REAL_CHECKPOINT = 'OpenGVLab/InternVL3_5-8B-Flash'
DESCRIPTION = """\
Start `lmdeploy serve api_server`, ask it about pictures without compression, as the router decides, and with all tiles
compressed, and print answers, tokens and times.

Without --checkpoint, the reader is served (`lmdeploy-vico reader --help`), with documents whose answers are known. With
it, photographs are sent, and what is in them is asked.
"""


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    demo = commands.add_parser(
        'demo',
        help='serve a checkpoint, ask it about pictures, show the tokens saved',
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument('--checkpoint', metavar='DIR', type=Path, help='what to serve (default: the reader)')
    demo.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve the checkpoint, ask about pictures, print tables, stop the server.

    Raises:
        CommandError: no checkpoint is there, a package is missing, or the server did not start or answer.
    """
    from rich.console import Console

    checkpoint = arguments.checkpoint
    if checkpoint:
        require_checkpoint(checkpoint)
    try:
        console = Console()
        # What goes into a file is as wide as it has to be.
        _show(checkpoint, console if console.is_terminal else Console(width=WIDTH))
    except (ServerError, ReaderError) as error:
        raise CommandError(str(error)) from error
    except ImportError as error:
        raise CommandError(f'{error.name} is missing; in a checkout of the plugin: pip install ".[demo]"') from error
    return 0


def _show(checkpoint: Path | None, console: 'Console') -> None:
    import openai  # noqa: F401  (what is missing is said before anything starts)

    from lmdeploy_vico.reader.demo import documents, photographs
    from lmdeploy_vico.reader.shipped import write_reader

    exhibits = photographs() if checkpoint else documents()
    with tempfile.TemporaryDirectory(prefix='vico-demo-') as scratch:
        model = checkpoint or Path(scratch, 'reader')
        if not checkpoint:
            write_reader(model)
        _serve(model, Path(scratch), exhibits, console)
    console.print(f'Server stopped. A real checkpoint: lmdeploy serve api_server {REAL_CHECKPOINT}', soft_wrap=True)


def _serve(model: Path, scratch: Path, exhibits: 'list[Exhibit]', console: 'Console') -> None:
    from lmdeploy_vico.reader.demo import answers_table, ask_about, counts_table, summary

    server = ApiServer(model, log=scratch / 'server.log')
    console.print('$ ' + ' '.join(server.command), style='bold', highlight=False, soft_wrap=True)
    console.print('Waiting until it is ready ...')
    with server:
        for line in server.log_text().splitlines():
            if 'lmdeploy_vico' in line:
                console.print(line, style='dim', highlight=False, soft_wrap=True)
        replies = ask_about(server.url, exhibits, console)
    console.print(counts_table(exhibits, replies))
    if any(exhibit.answer for exhibit in exhibits):
        console.print(answers_table(exhibits, replies))
        console.print(summary(exhibits, replies), highlight=False)
    else:
        for exhibit, said in zip(exhibits, replies, strict=True):
            console.print(f'{exhibit.name}: {said["auto"].answer}', markup=False, highlight=False)
