"""The ``lmdeploy-vico`` command. Serving itself is done by the unmodified ``lmdeploy serve api_server``."""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TypeAlias

from lmdeploy_vico import __version__
from lmdeploy_vico.cli import bench, demo, options, tiny
from lmdeploy_vico.cli.errors import CommandError

Commands: TypeAlias = 'argparse._SubParsersAction[argparse.ArgumentParser]'

DESCRIPTION = """\
lmdeploy-vico makes the unmodified `lmdeploy serve api_server` serve InternVL3.5-Flash (ViCO) checkpoints with right
answers and short prefills. There is nothing to start here: installing the package switches the plugin on.
This command makes small random checkpoints to try it with, lists the options of a server, reports what is installed,
runs a demonstration, and measures what compression gains.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own); return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own, server_arguments = bench.split(argv)
    said = argparse.Namespace(argv=['lmdeploy-vico', *argv], server_arguments=server_arguments)
    arguments = _parser().parse_args(own, said)
    try:
        status: int = arguments.run(arguments)
    except CommandError as error:
        print(f'lmdeploy-vico: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell reports a program that was interrupted
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='lmdeploy-vico', description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--version', action='version', version=f'lmdeploy-vico {__version__}')
    parser.set_defaults(run=lambda arguments: _help(parser))
    commands = parser.add_subparsers(title='commands', metavar='COMMAND')
    tiny.add_parser(commands)
    options.add_parser(commands)
    _add_env_parser(commands)
    demo.add_parser(commands)
    bench.add_parser(commands)
    return parser


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


def _add_env_parser(commands: Commands) -> None:
    env = commands.add_parser(
        'env',
        help='print versions, the device and whether the plugin is active',
        description='Print what a bug report needs: versions, the device, and whether the plugin is active.',
    )
    env.set_defaults(run=_env)


def _env(arguments: argparse.Namespace) -> int:
    del arguments
    rows = [('lmdeploy-vico', _version('lmdeploy-vico')), ('plugin', _plugin_state())]
    rows += [(name, _version(name)) for name in ('lmdeploy', 'torch', 'transformers', 'triton')]
    rows += [('python', platform.python_version()), ('device', _device())]
    for name, value in rows:
        print(f'{name:15}{value}')
    return 0


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return 'not installed'


def _plugin_state() -> str:
    """Say whether a program that imports LMDeploy now would run with the plugin, and what to change if not."""
    from lmdeploy_vico.adapter.patches.registration import lmdeploy_version_supported
    from lmdeploy_vico.autoload import MODES, SWITCH, switch

    mode, lmdeploy = switch(), _version('lmdeploy')
    if not metadata.entry_points(group='torch.backends', name='lmdeploy_vico'):
        return 'inactive: the package is not installed (pip install lmdeploy-vico), only on the path'
    if os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD', '1') == '0':
        return 'inactive: TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps PyTorch from loading it'
    if mode == '0':
        return f'inactive: {SWITCH}=0'
    if lmdeploy == 'not installed':
        return 'inactive: LMDeploy is not installed'
    if not lmdeploy_version_supported(lmdeploy):
        return f'inactive: it supports LMDeploy >= 0.18, < 0.19, not {lmdeploy}'
    if mode == 'cpu':
        return f'CPU backend only: {SWITCH}=cpu'
    return 'active' if mode in MODES else f'active; {SWITCH}={mode} is not one of {", ".join(MODES)} and counts as 1'


def _device() -> str:
    try:
        import torch
    except ImportError:
        return 'unknown: torch is not installed'
    if not torch.cuda.is_available():
        return f'cpu, {torch.get_num_threads()} threads (no CUDA device)'
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ', '.join(f'cuda:{i} {name}' for i, name in enumerate(names))
