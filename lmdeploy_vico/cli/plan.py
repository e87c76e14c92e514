"""``lmdeploy-vico plan``: how fast a deployment would be, and how many GPUs it needs."""

import argparse
import json
from typing import TYPE_CHECKING

from lmdeploy_vico.cli.errors import CommandError
from lmdeploy_vico.planning import PlanningError
from lmdeploy_vico.planning import arguments as options

if TYPE_CHECKING:
    from rich.console import Console

    from lmdeploy_vico.cli import Commands

LOG_WIDTH = 120  # of the table, where no terminal says how wide it is


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    plan = commands.add_parser(
        'plan',
        help='say how fast a deployment would be, and how many GPUs it needs',
        description=options.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_arguments(plan)
    plan.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, or how good the model is.

    Raises:
        CommandError: a package is missing, or there is no such deployment.
    """
    try:
        from rich.console import Console

        from lmdeploy_vico.planning import plan  # noqa: F401
    except ImportError as error:
        raise CommandError(f'{error.name} is missing; in a checkout of the plugin: pip install ".[plan]"') from error
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    try:
        return _check(arguments, console) if arguments.check else _plan(arguments, console)
    except PlanningError as error:
        raise CommandError(str(error)) from error


def _check(arguments: argparse.Namespace, console: 'Console') -> int:
    from lmdeploy_vico.planning import report
    from lmdeploy_vico.planning.calibration.paper import fit

    again = fit()
    if arguments.json:
        print(json.dumps(report.check_as_json(again), indent=2))
    else:
        report.show_check(again, console)
    return 0


def _plan(arguments: argparse.Namespace, console: 'Console') -> int:
    from lmdeploy_vico.planning import plan, report
    from lmdeploy_vico.planning.deployment import Deployment
    from lmdeploy_vico.planning.gpus import gpu_of
    from lmdeploy_vico.planning.language import model_of

    if not arguments.model:
        raise PlanningError('plan needs --model (or --check).')
    deployment = Deployment(
        model=model_of(arguments.model),
        gpu=gpu_of(arguments.gpu),
        tp=arguments.tp,
        dp=arguments.dp,
        vision_devices=arguments.vision_devices,
        cores=arguments.cores,
        max_prefill_tokens=arguments.max_prefill_token_num,
    )
    target = plan.Target(arguments.rate, arguments.ttft_p99, arguments.requests, arguments.seed)
    images = arguments.mode == 'image'
    found = plan.cells(deployment, arguments.tiles, arguments.text_tokens, arguments.compression, target, images)
    if arguments.json:
        print(json.dumps(report.plan_as_json(deployment, found, target), indent=2))
    else:
        report.show_plan(deployment, found, target, console)
    return 0
