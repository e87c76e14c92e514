"""``lmdeploy-vico tiny``: write a small random checkpoint, or one of a published model's shape."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy_vico.checkpoints.random.limits import server_arguments
from lmdeploy_vico.cli.errors import CommandError

if TYPE_CHECKING:
    from lmdeploy_vico.cli import Commands

DESCRIPTION = """\
Write a random checkpoint of a few megabytes in the published layout of InternVL3.5-Flash into DIR: real tile and token
counts, a working router, its own tokenizer; the answers depend on every picture and word and mean nothing.
The same options give the same bytes. Afterwards:

  lmdeploy serve api_server DIR --max-batch-size 32 --num-gpu-blocks 4096

Without the two limits, millions of small KV blocks would fill a GPU, and LMDeploy's decode graphs, whose tables grow
with them, would not fit. LMDeploy's own classes, which serve a checkpoint made with --plain, need --trust-remote-code
as well.

With --like, write config and tokenizer of a published model instead, to size a deployment of it before downloading it:
its weights are made up on the device when it is served with LMDEPLOY_VICO_DUMMY_WEIGHTS=1.

With --like and --weights, write random bfloat16 weights of that model as well, as large as the published ones (8B:
18 GB) and as fast as the disk takes them, for what can only read them from files, such as LMDeploy's own classes. If
that is interrupted, the directory cannot be served, and the same command starts again.
"""
PUBLISHED = ('1B', '2B', '4B', '8B', '14B', '30B-A3B', '38B', '241B')
TINY_ONLY = ('llm', 'vit', 'seed', 'size', 'dtype', 'plain')  # what --like excludes, but for the seed of --weights


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    tiny = commands.add_parser(
        'tiny',
        help='write a small random checkpoint',
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tiny.add_argument('directory', metavar='DIR', type=Path, help='where to; a tiny checkpoint there is overwritten')
    _add_tiny_options(tiny)
    tiny.add_argument(
        '--like',
        choices=PUBLISHED,
        metavar='MODEL',
        help=f'the shape of InternVL3.5-MODEL-Flash without weights: {", ".join(PUBLISHED)}',
    )
    tiny.add_argument('--weights', action='store_true', help='with --like: also write random weights of that shape')
    tiny.add_argument(
        '--force', action='store_true', help='write into a DIR that holds other files: those of the same names are lost'
    )
    tiny.set_defaults(run=run)


def _add_tiny_options(tiny: argparse.ArgumentParser) -> None:
    """Options that are attributes of the arguments only if they are given, so that --like can refuse them."""
    group = tiny.add_argument_group('of a checkpoint with weights', argument_default=argparse.SUPPRESS)
    group.add_argument('--llm', choices=('dense', 'moe'), help='Qwen3, or Qwen3-MoE with 8 experts (default: dense)')
    group.add_argument(
        '--vit',
        choices=('layer_norm', 'rms_norm'),
        help='the layout of InternViT-300M, or of InternViT-6B with its q and k norms (default: layer_norm)',
    )
    group.add_argument('--seed', type=int, help='of the random weights (default: 0)')
    group.add_argument('--size', choices=('tiny', 'small'), help='3 or 12 MB (default: tiny)')
    group.add_argument(
        '--dtype',
        choices=('bfloat16', 'float32'),
        help='of the stored weights; the values are the same (default: bfloat16)',
    )
    group.add_argument('--plain', action='store_true', help='a plain InternVL checkpoint: no router, 256 tokens a tile')


def run(arguments: argparse.Namespace) -> int:
    """Write the checkpoint; print its path, and how to serve it.

    Raises:
        CommandError: options that exclude each other, or a directory that cannot be written.
    """
    given = _check(arguments)
    path = _write(arguments, given)
    print(path)
    if arguments.like and not arguments.weights:
        print(
            f'Config and tokenizer of InternVL3.5-{arguments.like}-Flash, no weights. To measure with made-up weights:'
        )
        print(f'  LMDEPLOY_VICO_DUMMY_WEIGHTS=1 lmdeploy serve api_server {path}')
        return 0
    flags = [*server_arguments(path), *(['--trust-remote-code'] if given.get('plain') else [])]
    command = ' '.join(['lmdeploy serve api_server', str(path), *flags])
    print(f'Serve it: {command}', file=sys.stderr)  # so that a script reads the path only
    return 0


def _check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a checkpoint with weights that were given, or refuse those that --like excludes."""
    given = {name: getattr(arguments, name) for name in TINY_ONLY if hasattr(arguments, name)}
    excluded = [name for name in given if arguments.like and not (arguments.weights and name == 'seed')]
    if excluded:
        hint = ' (or add --weights)' if 'seed' in excluded and not arguments.weights else ''
        raise CommandError(f'--like says the whole shape: leave out --{", --".join(excluded)}{hint}.')
    if arguments.weights and not arguments.like:
        raise CommandError('--weights goes with --like MODEL: a tiny checkpoint always has weights.')
    return given


def _write(arguments: argparse.Namespace, given: dict[str, Any]) -> Path:
    from lmdeploy_vico.checkpoints.random.published import NoSpaceError, WeightsExistError

    try:
        return _make(arguments, given)
    except (WeightsExistError, NoSpaceError) as error:
        raise CommandError(str(error)) from error
    except FileExistsError as error:
        hint = '' if arguments.directory.is_file() else ': choose another directory, or add --force to write into it'
        raise CommandError(f'{error}{hint}') from error
    except OSError as error:
        raise CommandError(f'{arguments.directory} cannot be written: {error.strerror or error}') from error


def _make(arguments: argparse.Namespace, given: dict[str, Any]) -> Path:
    """Write the checkpoint that ``tiny`` was asked for; ``given`` are the options of one with weights."""
    from lmdeploy_vico.checkpoints import random

    if not arguments.like:
        options = {name: value for name, value in given.items() if name != 'plain'}
        flash = not given.get('plain', False)
        return random.make_tiny_checkpoint(arguments.directory, flash=flash, force=arguments.force, **options)
    if not arguments.weights:
        return random.make_checkpoint_without_weights(arguments.directory, arguments.like, arguments.force)
    return _make_with_weights(arguments.directory, arguments.like, given.get('seed', 0), arguments.force)


def _make_with_weights(directory: Path, like: str, seed: int, force: bool) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from lmdeploy_vico.checkpoints.random.published import make_checkpoint_with_weights, weight_bytes

    columns = (
        TextColumn('Writing weights'),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task('', total=weight_bytes(like))
        return make_checkpoint_with_weights(directory, like, seed, force, lambda size: progress.advance(task, size))
