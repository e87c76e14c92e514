"""How many prefill steps a server's engine takes, from LMDeploy's debug log: its metrics do not say.

Writing that log takes time from the engine, so that what is timed and what is counted are different servers.
"""

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.client import Client
from lmdeploy_vico.bench.workload.requests import Cell, Requests
from lmdeploy_vico.launch import ApiServer

DEBUG = ('--log-level', 'DEBUG')  # what a server has to be started with
COUNTED = 4  # requests of a cell for each that is on its way at a time
STEP = re.compile(rb'Sending forward inputs: [^\n]*is_decoding=False')


class PrefillLog:
    """Counts the steps that were started since it was asked last. Their lines are written before anything is answered.

    Args:
        log: what the server and its engine print to.
    """

    def __init__(self, log: Path) -> None:
        self._log, self._read = log, 0

    def taken(self) -> int:
        """Steps since the last call."""
        with self._log.open('rb') as file:
            file.seek(self._read)
            whole_lines, end, _ = file.read().rpartition(b'\n')
        self._read += len(whole_lines) + len(end)
        return len(STEP.findall(whole_lines))


async def count_prefills(
    server: ApiServer, requests: Requests, cells: Mapping[Cell, int], concurrency: int, timeout: float
) -> dict[Cell, float]:
    """Start a server, send it some requests of each cell, stop it; the prefill steps of a request, by cell.

    Args:
        server: started at debug log level; its name for the model is that in ``requests``.
        cells: how many requests there are of each; at most ``COUNTED * concurrency`` are sent.

    Raises:
        BenchError: a request failed.
        ServerError: the server did not start.
    """
    async with contextlib.AsyncExitStack() as stack:
        server.start()
        stack.callback(server.stop)
        log = PrefillLog(server.log)
        await asyncio.to_thread(server.wait_until_ready)
        client = await stack.enter_async_context(Client(server.url, timeout))
        found = {}
        for cell, number in cells.items():
            bodies = [requests.body(cell, index) for index in range(min(number, COUNTED * concurrency))]
            await _answered(client, bodies[:concurrency], concurrency)  # kernels are compiled, the KV cache is warm
            log.taken()
            await _answered(client, bodies, concurrency)
            found[cell] = log.taken() / len(bodies)
        return found


async def _answered(client: Client, bodies: Sequence[bytes], concurrency: int) -> None:
    """Send requests; raises :class:`BenchError` unless all are answered."""
    errors = [one.error for one in (await client.round(bodies, concurrency)).outcomes if one.error]
    if errors:
        raise BenchError(errors[-1])
