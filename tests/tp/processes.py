"""The processes of a server: its ranks, by what the executors call them, and whether any is left at its end."""

import psutil
from waiting import HANG

from lmdeploy_vico.launch import ApiServer

RANKS = {'mp': 'ExecutorProc', 'ray': 'ray::RayWorkerWrapper'}
# A server's processes are given this before they count as left over; Ray's end some seconds after their driver.
ENDING = 60  # seconds
# Every server has a Ray cluster of its own, whatever else runs on this machine.
OWN_CLUSTER = {'RAY_ADDRESS': 'local'}


def ranks(pid: int, executor: str) -> list[psutil.Process]:
    """The processes of an executor's ranks below a server's process, the oldest first."""
    below = psutil.Process(pid).children(recursive=True)
    return sorted((one for one in below if name(one).startswith(RANKS[executor])), key=lambda one: one.create_time())


def name(process: psutil.Process) -> str:
    """What a process calls itself: Linux cuts its name after 15 characters."""
    try:
        return ' '.join(process.cmdline()) or process.name()
    except psutil.NoSuchProcess:
        return ''


def stop(server: ApiServer, *others: psutil.Process) -> None:
    """Stop a server and assert that neither a process below it nor one of ``others`` is left."""
    processes = [*others, *(psutil.Process(server.pid).children(recursive=True) if server.alive() else ())]
    server.stop()
    require_ended(processes)


def require_ended(processes: list[psutil.Process]) -> None:
    """Assert that processes have ended, and end those that have not."""
    left = psutil.wait_procs(processes, ENDING)[1]
    names = [name(one) for one in left]
    for one in left:
        one.kill()
    psutil.wait_procs(left, HANG)
    assert not names, f'left over: {names}'
