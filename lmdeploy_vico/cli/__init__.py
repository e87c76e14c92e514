"""The ``lmdeploy-vico`` command. Serving itself is done by the unmodified ``lmdeploy serve api_server``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmdeploy_vico import __version__
from lmdeploy_vico.bench import arguments as bench_arguments
from lmdeploy_vico.cli import env

DESCRIPTION = """\
lmdeploy-vico makes the unmodified `lmdeploy serve api_server` serve InternVL3.5-Flash (ViCO) checkpoints with right
answers and short prefills. There is nothing to start here: installing the package switches the plugin on.
This command makes small random checkpoints to try it with, reports what is installed, runs a demonstration, and
measures what compression gains.
"""
TINY = """\
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own); return its exit status."""
    own, server_arguments = _split(list(sys.argv[1:] if argv is None else argv))
    arguments = _parser().parse_args(own)
    if arguments.run is _bench:
        arguments.server_arguments = server_arguments
        arguments.argv = ['lmdeploy-vico', *own, *(['--'] if server_arguments else []), *server_arguments]
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return 130  # as a shell reports a program that was interrupted
    return status


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What follows ``--`` after ``bench`` is for the server; argparse would mix it with options of several values."""
    if argv[:1] != ['bench'] or '--' not in argv:
        return argv, []
    end = argv.index('--')
    return argv[:end], argv[end + 1 :]


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog='lmdeploy-vico', description=DESCRIPTION, formatter_class=raw)
    parser.add_argument('--version', action='version', version=f'lmdeploy-vico {__version__}')
    parser.set_defaults(run=lambda arguments: _help(parser))
    commands = parser.add_subparsers(title='commands', metavar='COMMAND')

    tiny = commands.add_parser('tiny', help='write a small random checkpoint', description=TINY, formatter_class=raw)
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
    tiny.set_defaults(run=_tiny)

    environment = commands.add_parser('env', help=env.HELP, description=env.DESCRIPTION)
    env.add_arguments(environment)
    environment.set_defaults(run=env.run)

    demo = commands.add_parser(
        'demo',
        help='serve a checkpoint, send it photographs, show the tokens saved',
        description='Start `lmdeploy serve api_server`, send it photographs, print the tokens that ViCO saves.',
    )
    demo.add_argument(
        '--checkpoint', metavar='DIR', type=Path, help='what to serve (default: a tiny random checkpoint, made now)'
    )
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        'bench',
        help='measure first-token throughput by token compression',
        description=bench_arguments.DESCRIPTION,
        formatter_class=raw,
    )
    bench_arguments.add_arguments(bench)
    bench.set_defaults(run=_bench)
    return parser


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


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


def _tiny(arguments: argparse.Namespace) -> int:
    from lmdeploy_vico.checkpoints.random.limits import server_arguments
    from lmdeploy_vico.checkpoints.random.published import NoSpaceError, WeightsExistError

    given = {name: getattr(arguments, name) for name in TINY_ONLY if hasattr(arguments, name)}
    excluded = [name for name in given if arguments.like and not (arguments.weights and name == 'seed')]
    if excluded:
        hint = ' (or add --weights)' if 'seed' in excluded and not arguments.weights else ''
        return _fail(f'--like says the whole shape: leave out --{", --".join(excluded)}{hint}.')
    if arguments.weights and not arguments.like:
        return _fail('--weights goes with --like MODEL: a tiny checkpoint always has weights.')
    try:
        path = _make(arguments, given)
    except (WeightsExistError, NoSpaceError) as error:
        return _fail(str(error))
    except FileExistsError as error:
        hint = '' if arguments.directory.is_file() else ': choose another directory, or add --force to write into it'
        return _fail(f'{error}{hint}')
    except OSError as error:
        return _fail(f'{arguments.directory} cannot be written: {error.strerror or error}')
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


def _demo(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lmdeploy_vico.cli import demo
    from lmdeploy_vico.launch import ServerError

    checkpoint = arguments.checkpoint
    if checkpoint and not (checkpoint / 'config.json').is_file():
        return _fail(f'{checkpoint} is not a checkpoint directory: it holds no config.json')
    try:
        demo.run(checkpoint, Console())
    except (demo.DemoError, ServerError) as error:
        return _fail(str(error))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from lmdeploy_vico.launch import ServerError

    try:
        from lmdeploy_vico.bench import BenchError, first_token
    except ImportError as error:
        return _fail(f'The benchmark needs {error.name}; in a checkout of the plugin: pip install ".[bench]"')
    try:
        return first_token.run(arguments)
    except (BenchError, ServerError) as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    print(f'lmdeploy-vico: {message}', file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
