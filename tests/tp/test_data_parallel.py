"""``--dp 2 --tp 2``: LMDeploy starts a server for each of two ranks, which share the layers behind the attention."""

import os
import signal
import socket
import time
from types import SimpleNamespace

import psutil
import pytest
from ports import free_port
from serving.client import Client
from tp import processes
from tp.asking import check_answers
from tp.processes import require_ended
from waiting import HANG

from lmdeploy_vico.launch import ApiServer

pytestmark = [pytest.mark.tp, pytest.mark.server]

POLL = 0.2  # seconds
RANKS = 2


def own_address() -> str:
    """The address of this machine that LMDeploy's servers listen on, as LMDeploy finds it; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(('8.8.8.8', 0))
        except OSError:
            pytest.skip('LMDeploy finds its own address only on a machine with a route to the internet')
        return str(probe.getsockname()[0])


def neighbouring_ports() -> int:
    """The first of two ports on which nothing listens."""
    while True:
        first = free_port()
        with socket.socket() as second:
            try:
                second.bind(('127.0.0.1', first + 1))
            except (OSError, OverflowError):
                continue
        return first


def well(address: str, port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((address, port)) == 0


@pytest.mark.parametrize(
    ('kind', 'end'),
    [
        pytest.param({}, ApiServer.stop, id='dense, stopped'),
        pytest.param(
            {'llm': 'moe', 'dtype': 'float32'}, lambda one: os.kill(one.pid, signal.SIGKILL), id='moe, killed'
        ),
    ],
)
def test_answers_of_both_servers_are_right(kind, end, make_checkpoint, prompts, judge, tmp_path):
    """And at the end, however it comes, no process is left."""
    address, first = own_address(), neighbouring_ports()
    arguments = ('--dp', str(RANKS), '--tp', str(RANKS), '--server-port', str(first), '--model-name', 'vico')
    environment = {
        **processes.OWN_CLUSTER,
        'LMDEPLOY_DP_MASTER_ADDR': '127.0.0.1',
        'LMDEPLOY_DP_MASTER_PORT': str(free_port()),
    }
    launcher = ApiServer(make_checkpoint(**kind), *arguments, log=tmp_path / 'log', environment=environment)
    launcher.start()
    below: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + HANG
        while not all(well(address, first + rank) for rank in range(RANKS)):
            assert launcher.alive() and time.monotonic() < deadline, launcher.log_tail()
            time.sleep(POLL)
        assert len(processes.ranks(launcher.pid, 'ray')) == RANKS
        below = psutil.Process(launcher.pid).children(recursive=True)
        urls = [f'http://{address}:{first + rank}' for rank in range(RANKS)]
        clients = [Client(SimpleNamespace(url=url, command=launcher.command)) for url in urls]
        check = judge(**kind).check
        check_answers(clients, prompts, check)
        check_answers(clients[:1], prompts, check, rounds=1)  # the other rank has nothing to do
    finally:
        below = below or psutil.Process(launcher.pid).children(recursive=True)
        end(launcher)
        require_ended(below)
        launcher.stop()
