"""The processes of a server: its ranks, by what the executors call them, and whether any is left at its end."""

import contextlib
import secrets

import psutil
from waiting import HANG

from lmdeploy_vico.launch import ApiServer

# A server's processes are given this before they count as left over. Ray's end some seconds after their driver; two
# agents of a cluster that was killed wait for it for a minute.
ENDING = 180  # seconds
# Every server has a Ray cluster of its own, whatever else runs on this machine. Without a token in the environment, Ray
# would write one into the user's home.
OWN_CLUSTER = {'RAY_ADDRESS': 'local', 'RAY_AUTH_MODE': 'token', 'RAY_AUTH_TOKEN': secrets.token_hex(32)}


def ranks(pid: int, executor: str) -> list[psutil.Process]:
    """The processes of an executor's ranks below a process, the oldest first.

    Ray names its workers by their class. Those of ``mp`` are what the engine's process has spawned.
    """
    below = psutil.Process(pid).children(recursive=True)
    engines = {one.pid for one in below if title(one).startswith('ZMQMPEngine')}

    def is_rank(one: psutil.Process) -> bool:
        if executor == 'ray':
            return command(one).startswith('ray::RayWorkerWrapper')
        return one.ppid() in engines and 'spawn_main' in command(one)

    return sorted(filter(is_rank, below), key=lambda one: one.create_time())


def title(process: psutil.Process) -> str:
    """The name that a process gives itself, or nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ''


def command(process: psutil.Process) -> str:
    """The command line of a process, or nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return ' '.join(process.cmdline())
    return ''


def stop(server: ApiServer, *others: psutil.Process) -> None:
    """Stop a server and assert that neither a process below it nor one of ``others`` is left."""
    processes = [*others, *(psutil.Process(server.pid).children(recursive=True) if server.alive() else ())]
    server.stop()
    require_ended(processes)


def require_ended(processes: list[psutil.Process]) -> None:
    """Assert that processes have ended, and end those that have not."""
    left = psutil.wait_procs(processes, ENDING)[1]
    names = [command(one) or title(one) for one in left]
    for one in left:
        one.kill()
    psutil.wait_procs(left, HANG)
    assert not names, f'left over: {names}'
