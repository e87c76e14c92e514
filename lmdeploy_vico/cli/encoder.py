"""``lmdeploy-vico encoder``: image encoders in a Ray cluster, for any number of servers."""

import argparse
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy_vico import log
from lmdeploy_vico.cli.errors import CommandError
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.options import OptionError, Options

if TYPE_CHECKING:
    from lmdeploy_vico.cli import Commands

HELP = 'start encoders in a Ray cluster, which servers use with vision_device=ray:auto'
DESCRIPTION = """\
Start encoders of a checkpoint on this machine, as actors of a Ray cluster that runs here (`ray start`), and keep them
there until this command is stopped. Servers of the same checkpoint find them with LMDEPLOY_VICO_VISION_DEVICE=ray:auto
or ray:HOST:PORT. Of the options of a server, LMDEPLOY_VICO_TILE_BATCH, _CACHE_BYTES, _KERNELS and _VIT_SPEEDUPS hold
for encoders too. docs/encoders.md says how to start a cluster that nobody else can run code in.
"""


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    parser = commands.add_parser(
        'encoder', help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    parser.add_argument('--model', type=Path, required=True, metavar='DIR', help='the checkpoint, on this machine')
    parser.add_argument(
        '--devices', choices=('cuda', 'cpu'), help='what encodes; by default cuda, or cpu where there is no GPU'
    )
    parser.add_argument(
        '--num', type=int, metavar='N', help='how many encoders; by default one for each GPU, or 1 on a CPU'
    )
    parser.add_argument('--address', default='auto', help='of the Ray cluster, HOST:PORT (default: the one that runs)')
    parser.add_argument(
        '--insecure',
        action='store_true',
        help='join a cluster without token authentication that is reachable from other machines',
    )


def run(arguments: argparse.Namespace) -> int:
    """Start encoders and stay until SIGTERM or SIGINT; return 0 then.

    Raises:
        CommandError: Ray is missing, the cluster cannot be used, or the encoders cannot start or have gone.
    """
    try:
        from lmdeploy_vico.stage.remote.cluster import ClusterError
        from lmdeploy_vico.stage.remote.command import Encoders, Plan, gpus
    except ImportError as error:
        raise CommandError(f'Encoders need {error.name}: pip install "ray[default]".') from error
    log.setup()
    there = gpus()
    cuda = there > 0 if arguments.devices is None else arguments.devices == 'cuda'
    number = arguments.num if arguments.num is not None else max(there, 1) if cuda else 1
    if number < 1:
        raise CommandError(f'--num must be at least 1, not {number}.')
    stop = threading.Event()
    try:
        plan = Plan(arguments.model, cuda, number, arguments.address, arguments.insecure, Options.load())
        encoders = Encoders(plan)
        # Not before Ray has put a handler of its own in place.
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, lambda *_: stop.set())
        try:
            encoders.start()
            encoders.watch(stop)
        finally:
            encoders.stop()
    except (ClusterError, OptionError, UnsupportedCheckpointError, OSError) as error:
        raise CommandError(str(error)) from error
    return 0
