"""``lmdeploy-vico env``: what is installed, and whether every change to LMDeploy fits it."""

import argparse
import os
import platform
import textwrap
from importlib import metadata
from itertools import groupby
from typing import TYPE_CHECKING

from lmdeploy_vico.options import OptionError, Options, environment_options

if TYPE_CHECKING:
    from lmdeploy_vico.cli import Commands
    from lmdeploy_vico.patching import Patch

HELP = 'print versions, the device and whether the plugin is active'
DESCRIPTION = """\
Print what a bug report needs: versions, devices, whether the plugin is active, and the options that the environment
sets. With --patches, check every
change that the plugin makes to LMDeploy against the installed one: the command to run first on a new LMDeploy.
"""
_WIDTH = 120
FITS, UNSEEN = 'fits', 'not looked at, as TurboMind cannot be loaded here (it needs a CUDA driver)'


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    parser = commands.add_parser('env', help=HELP, description=DESCRIPTION)
    parser.set_defaults(run=run)
    parser.add_argument(
        '--patches',
        action='store_true',
        help='list every change to LMDeploy, why it is made and when it can go; the exit status is 1 if one does not '
        'fit the installed LMDeploy',
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what is installed, or the patches; return the exit status."""
    if arguments.patches:
        return _print_patches()
    rows = [('lmdeploy-vico', _version('lmdeploy-vico')), ('plugin', _plugin_state())]
    rows += [(name, _version(name)) for name in ('lmdeploy', 'torch', 'transformers', 'triton')]
    rows += [('python', platform.python_version())]
    rows += [('device', device) for device in _devices()]
    rows += [('option', option) for option in _options()]
    for name, value in rows:
        print(f'{name:15}{value}')
    return 0


def _print_patches() -> int:
    """List every patch with its state; those of one name, which differ only in their targets, together."""
    from lmdeploy_vico.adapter.patches.table import all_patches, supported_range

    patches = all_patches()
    misfits: list[Patch] = []
    unseen = 0
    for _, alike in groupby(patches, key=lambda patch: patch.change):
        group = list(alike)
        print(group[0].name)
        _print_row('what', group[0].what)
        _print_row('why', group[0].why)
        _print_row('can go when', group[0].until)
        _print_row('process', f'{group[0].process}, {group[0].trigger.value}')
        for patch in group:
            state = _state(patch)
            misfits += [patch] if state not in (FITS, UNSEEN) else []
            unseen += state == UNSEEN
            _print_row('target', f'{patch.target}: {state}')
        print()
    print(f'The patches are made for LMDeploy {supported_range()}; {_version("lmdeploy")} is installed.')
    print(f'{len(patches) - len(misfits) - unseen} of {len(patches) - unseen} fit it.')
    for patch in misfits:
        print(f'Does not fit: {patch}')
    return 1 if misfits else 0


def _state(patch: 'Patch') -> str:
    """Say whether a patch fits, and why if it does not."""
    from lmdeploy_vico.adapter.patches.table import can_be_checked
    from lmdeploy_vico.patching import MisfitError, check

    if not can_be_checked(patch):
        return UNSEEN
    try:
        check(patch)
    except MisfitError as error:
        return str(error)
    return FITS


def _print_row(name: str, text: str) -> None:
    indent = ' ' * 15
    print(textwrap.fill(text, _WIDTH, initial_indent=f'  {name:13}', subsequent_indent=indent, break_long_words=False))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return 'not installed'


def _plugin_state() -> str:
    """Say whether a program that imports LMDeploy now would run with the plugin, and what to change if not."""
    from lmdeploy_vico.adapter.patches.table import is_supported, supported_range
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
    if not is_supported(lmdeploy):
        return f'inactive: it supports LMDeploy {supported_range()}, not {lmdeploy}'
    if mode == 'cpu':
        return f'CPU backend only: {SWITCH}=cpu'
    return 'active' if mode in MODES else f'active; {SWITCH}={mode} is not one of {", ".join(MODES)} and counts as 1'


def _devices() -> list[str]:
    try:
        import torch
    except ImportError:
        return ['unknown: torch is not installed']
    if not torch.cuda.is_available():
        return [f'cpu, {torch.get_num_threads()} threads (no CUDA device)']
    return [f'cuda:{index} {torch.cuda.get_device_name(index)}' for index in range(torch.cuda.device_count())]


def _options() -> list[str]:
    """The options that the environment sets, as they are read, and what is wrong with them."""
    try:
        given = environment_options()
        values = Options.load()
    except OptionError as error:
        return [f'wrong: {error}']
    return [f'{name} = {getattr(values, name)}' for name in given]
