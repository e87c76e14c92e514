"""``lmdeploy-vico train``: the command line of training."""

import argparse
from typing import TYPE_CHECKING

from lmdeploy_vico.cli.errors import CommandError
from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training import arguments as options

if TYPE_CHECKING:
    from lmdeploy_vico.cli import Commands

REQUIRED = ('model', 'data', 'output')


def add_parser(commands: 'Commands') -> None:
    """Add the command and its stages."""
    raw = argparse.RawDescriptionHelpFormatter
    train = commands.add_parser(
        'train', help='make a checkpoint a ViCO one', description=options.TRAIN, formatter_class=raw
    )
    train.set_defaults(run=lambda arguments: _help(train))
    stages = train.add_subparsers(title='stages', metavar='STAGE')
    init = stages.add_parser(
        'init',
        help='add a fresh projector of compressed tiles and a fresh router',
        description='Write the checkpoint SRC with fresh mlp2, router and thresholds into DIR. Until its router is '
        'trained, a server compresses none of its tiles.',
    )
    options.add_init(init)
    init.set_defaults(run=_init)
    consistency = stages.add_parser(
        'consistency', help='train the model', description=options.CONSISTENCY, formatter_class=raw
    )
    options.add_consistency(consistency)
    consistency.set_defaults(run=lambda arguments: _run(arguments, 'consistency'))
    router = stages.add_parser('router', help='train the router', description=options.ROUTER, formatter_class=raw)
    options.add_router(router)
    router.set_defaults(run=lambda arguments: _run(arguments, 'router'))


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


def _missing(error: ImportError) -> CommandError:
    return CommandError(f'{error.name} is missing; in a checkout of the plugin: pip install ".[train]"')


def _init(arguments: argparse.Namespace) -> int:
    """Initialise; raises CommandError where the source does not fit."""
    try:
        from lmdeploy_vico.config import UnsupportedCheckpointError
        from lmdeploy_vico.training.stages.initialise import initialise
    except ImportError as error:
        raise _missing(error) from error
    try:
        initialise(arguments.source, arguments.directory, arguments.seed)
    except (TrainingError, UnsupportedCheckpointError) as error:
        raise CommandError(str(error)) from error
    print(arguments.directory)
    return 0


def _run(arguments: argparse.Namespace, stage: str) -> int:
    """Run a stage, or say what it would cost.

    Raises:
        CommandError: a package is missing, options are missing or do not fit, data or checkpoints are bad.
    """
    try:
        from lmdeploy_vico.config import UnsupportedCheckpointError
        from lmdeploy_vico.training import command
    except ImportError as error:
        raise _missing(error) from error
    missing = [] if arguments.dry_run else [f'--{name}' for name in REQUIRED if getattr(arguments, name) is None]
    if missing:
        raise CommandError(f'train {stage} needs {", ".join(missing)} (or --dry-run).')
    try:
        if arguments.dry_run:
            command.estimate(arguments, stage)
        else:
            command.train(arguments, stage)
    except (TrainingError, UnsupportedCheckpointError) as error:
        raise CommandError(str(error)) from error
    return 0
