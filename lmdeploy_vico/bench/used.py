"""What a round of requests has added to a server's metrics, and the processor time that the server took for it."""

import asyncio
import contextlib
import time
from collections.abc import Mapping

import psutil

from lmdeploy_vico.bench.client import Client, Round
from lmdeploy_vico.bench.report.breakdown import difference, parse_metrics
from lmdeploy_vico.launch import ApiServer

SETTLED, POLL = 5.0, 0.05  # seconds to wait for the engine's metrics of the last requests, and between two looks
PREFILLS = 'lmdeploy:request_prefill_time_seconds_count'


async def what_was_added(client: Client, before: Mapping[str, float], measured: Round) -> dict[str, float]:
    """Return what a round added to the metrics, once the engine has reported its last requests."""
    answered = sum(outcome.error is None for outcome in measured.outcomes)
    end = time.monotonic() + (SETTLED if PREFILLS in before else 0)
    while True:
        after = parse_metrics(await client.metrics())
        added = difference(after, before)
        if added.get(PREFILLS, 0) >= answered or not after or time.monotonic() >= end:
            return added
        await asyncio.sleep(POLL)


def processor_seconds(server: ApiServer | None) -> dict[str, float]:
    """Return the processor time that a server's processes have taken so far, whatever else kept the machine busy.

    Returns:
        Seconds of the API process, ``api``, and of all that it has started, ``engine``; empty for a server elsewhere,
        or one that has ended.
    """
    if server is None or not server.alive():
        return {}
    with contextlib.suppress(psutil.NoSuchProcess):  # it may end at any time
        api = psutil.Process(server.pid)
        started = sum(_seconds(process) for process in api.children(recursive=True))
        return {'api': _seconds(api), 'engine': started}
    return {}


def _seconds(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0
