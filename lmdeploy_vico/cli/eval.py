"""``lmdeploy-vico eval``: the command line of the evaluation."""

import argparse
from typing import TYPE_CHECKING

from lmdeploy_vico.cli.errors import CommandError
from lmdeploy_vico.evaluation import arguments as evaluation_arguments
from lmdeploy_vico.launch import ServerError

if TYPE_CHECKING:
    from lmdeploy_vico.cli import Commands

LOG_WIDTH = 120  # of the table, where no terminal says how wide it is


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    evaluate = commands.add_parser(
        'eval',
        help='judge what compression costs in answers',
        description=evaluation_arguments.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluation_arguments.add_arguments(evaluate)
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; return 0 if every question was answered.

    Raises:
        CommandError: a package is missing, a file is malformed, or a server did not start.
    """
    try:
        from rich.console import Console

        from lmdeploy_vico.bench import BenchError
        from lmdeploy_vico.evaluation import EvaluationError
        from lmdeploy_vico.evaluation.run import Evaluation
    except ImportError as error:
        raise CommandError(f'{error.name} is missing; in a checkout of the plugin: pip install ".[eval]"') from error
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    evaluation = Evaluation(arguments, console)
    try:
        evaluation.prepare()
        return 0 if evaluation.run() else 1
    except (EvaluationError, BenchError, ServerError) as error:
        raise CommandError(str(error)) from error
