"""``lmdeploy-vico bench``: the command line of the first-token benchmark."""

import argparse
from typing import TYPE_CHECKING

from lmdeploy_vico.bench import arguments as bench_arguments
from lmdeploy_vico.cli.errors import CommandError
from lmdeploy_vico.launch import ServerError

if TYPE_CHECKING:
    from lmdeploy_vico.cli import Commands


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    bench = commands.add_parser(
        'bench',
        help='measure first-token throughput by token compression',
        description=bench_arguments.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_arguments.add_arguments(bench)
    bench.set_defaults(run=run)


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the command's own arguments and the server's, which follow ``--``.

    Argparse would give the server's arguments to options that take several values.
    """
    if argv[:1] not in (['bench'], ['calibrate'], ['eval']) or '--' not in argv:
        return argv, []
    end = argv.index('--')
    return argv[:end], argv[end + 1 :]


def run(arguments: argparse.Namespace) -> int:
    """Measure; return 0 if every request of the plugin's own cells was answered.

    Raises:
        CommandError: a package is missing, a server did not start, or the measurement cannot be made.
    """
    try:
        from lmdeploy_vico.bench import BenchError, first_token
    except ImportError as error:
        raise CommandError(
            f'The benchmark needs {error.name}; in a checkout of the plugin: pip install ".[bench]"'
        ) from error
    try:
        return first_token.run(arguments)
    except (BenchError, ServerError) as error:
        raise CommandError(str(error)) from error
