"""The ``lmdeploy-vico`` command. Serving itself is done by the unmodified ``lmdeploy serve api_server``."""

import argparse
import sys
from collections.abc import Sequence
from typing import TypeAlias

from lmdeploy_vico import __version__
from lmdeploy_vico.cli import bench, demo, encoder, env, eval, metrics, options, plan, train
from lmdeploy_vico.cli.errors import CommandError
from lmdeploy_vico.cli.inspecting import calibrate, route
from lmdeploy_vico.cli.making import documents, reader, tiny

Commands: TypeAlias = 'argparse._SubParsersAction[argparse.ArgumentParser]'

DESCRIPTION = """\
lmdeploy-vico makes the unmodified `lmdeploy serve api_server` serve InternVL3.5-Flash (ViCO) checkpoints with right
answers and short prefills. There is nothing to start here: installing the package switches the plugin on.
This command makes small random checkpoints to try it with, lists the options and metrics of a server, reports what is
installed, runs a demonstration, starts encoders that servers share, shows which tiles of pictures are compressed, sets
the router's threshold, measures what compression gains, judges what it costs in answers, plans deployments, and trains
checkpoints for it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own); return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own, server_arguments = bench.split(argv)
    said = argparse.Namespace(argv=['lmdeploy-vico', *argv], server_arguments=server_arguments)
    arguments = parser().parse_args(own, said)
    try:
        status: int = arguments.run(arguments)
    except CommandError as error:
        print(f'lmdeploy-vico: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell reports a program that was interrupted
    return status


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    whole = argparse.ArgumentParser(
        prog='lmdeploy-vico', description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument('--version', action='version', version=f'lmdeploy-vico {__version__}')
    whole.set_defaults(run=lambda arguments: _help(whole))
    commands = whole.add_subparsers(title='commands', metavar='COMMAND')
    reader.add_parser(commands)
    tiny.add_parser(commands)
    options.add_parser(commands)
    metrics.add_parser(commands)
    env.add_parser(commands)
    demo.add_parser(commands)
    documents.add_parser(commands)
    route.add_parser(commands)
    calibrate.add_parser(commands)
    bench.add_parser(commands)
    eval.add_parser(commands)
    plan.add_parser(commands)
    encoder.add_parser(commands)
    train.add_parser(commands)
    return whole


def _help(whole: argparse.ArgumentParser) -> int:
    whole.print_help()
    return 0
