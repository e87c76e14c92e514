"""Two nodes of a Ray cluster, which are two raylets on this machine, with one rank each."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ports import free_port
from serving.client import Client
from tp import processes
from tp.asking import check_answers
from waiting import HANG

pytestmark = [pytest.mark.tp, pytest.mark.server]

POLL = 0.2  # seconds
HEAD, OTHER = '127.0.0.1', '127.0.0.2'
OBJECT_STORE = 100 << 20  # bytes
RAY = Path(sys.executable).with_name('ray')
# How many nodes a cluster has; a driver of its own asks, which ends with the question.
COUNT = 'import json, ray; ray.init(logging_level="ERROR"); print(json.dumps([n["Alive"] for n in ray.nodes()]))'


@contextlib.contextmanager
def node(environment: dict[str, str], *arguments: str) -> Iterator[psutil.Process]:
    """A raylet, and what belongs to it, with one logical GPU."""
    command = [RAY, 'start', *arguments, '--num-gpus', '1', '--num-cpus', '0', '--block', '--disable-usage-stats']
    command += ['--object-store-memory', str(OBJECT_STORE)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as process:
        started = psutil.Process(process.pid)
        try:
            yield started
        finally:
            below = started.children(recursive=True)
            process.terminate()
            process.wait(HANG)
            processes.require_ended(below)


@pytest.fixture
def cluster() -> Iterator[tuple[dict[str, str], list[psutil.Process]]]:
    """The environment that leads to a cluster of two nodes, and the processes that started them."""
    with tempfile.TemporaryDirectory(prefix='ray', dir='/tmp') as directory:  # the paths of sockets have to be short
        address = f'{HEAD}:{free_port()}'
        variables = {'RAY_ADDRESS': address, 'RAY_AUTH_MODE': 'token', 'RAY_AUTH_TOKEN': secrets.token_hex(32)}
        environment = {key: value for key, value in os.environ.items() if key != 'CUDA_VISIBLE_DEVICES'} | variables
        head = ('--head', '--port', address.partition(':')[2], '--temp-dir', directory, '--include-dashboard', 'false')
        starting = {key: value for key, value in environment.items() if key != 'RAY_ADDRESS'}
        with (
            node(starting, *head, '--node-ip-address', HEAD) as first,
            node(starting, '--address', address, '--node-ip-address', OTHER) as second,
        ):
            wait_for_nodes(environment, 2)
            yield variables, [first, second]


def wait_for_nodes(environment: dict[str, str], count: int) -> None:
    deadline = time.monotonic() + HANG
    while True:
        asked = subprocess.run(
            [sys.executable, '-c', COUNT], env=environment, capture_output=True, text=True, timeout=HANG, check=False
        )
        if asked.returncode == 0 and sum(json.loads(asked.stdout.splitlines()[-1])) == count:
            return
        assert time.monotonic() < deadline, asked.stderr
        time.sleep(POLL)


def test_answers_are_right(cluster, serve_ranks, make_checkpoint, prompts, judge):
    environment, nodes = cluster
    # In float32: one of bfloat16's near ties falls otherwise when two ranks round their sums.
    kind = {'dtype': 'float32'}
    ranks = ('--tp', '2', '--distributed-executor-backend', 'ray')
    server = serve_ranks(make_checkpoint(**kind), *ranks, **environment)
    assert 'ranks (2) run in the cluster that runs already' in server.log_text()
    assert processes.ranks(server.pid, 'ray') == []  # they are not the server's processes, but the nodes'
    assert [len(processes.ranks(one.pid, 'ray')) for one in nodes] == [1, 1]
    check_answers([Client(server)], prompts, judge(**kind).check)
    workers = [worker for one in nodes for worker in processes.ranks(one.pid, 'ray')]
    processes.stop(server, *workers)  # the cluster stays, without the ranks
    assert all(one.is_running() for one in nodes)
