"""Looks up hosts in threads of its own, a fair share of them for each client.

A look-up cannot be interrupted: a name server that never answers holds a thread for as long as the system waits for it,
whoever has given up meanwhile. In the event loop's own pool a few of them would stop everything else that is there.
"""

import asyncio
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_vico.media.workers.queue import FairQueue

THREADS = 16  # one client can hold all but one
Address = tuple[socket.AddressFamily, str]


@dataclass(eq=False)
class _Lookup:
    host: str
    port: int
    found: 'Future[list[Address]]' = field(default_factory=Future)


class Resolver:
    """Finds the addresses of hosts. Safe to use from several threads and event loops."""

    def __init__(self) -> None:
        self._queue: FairQueue[_Lookup] = FairQueue(THREADS)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    async def addresses(self, host: str, port: int, client: str) -> Sequence[Address]:
        """The addresses of a host, as the system has them.

        Args:
            host: a name or an address.
            port: of the service.
            client: who asks.

        Raises:
            OSError, UnicodeError: there are none.
        """
        lookup = _Lookup(host, port)
        self._start()
        self._queue.put(client, lookup)
        try:
            return await asyncio.wrap_future(lookup.found)
        except asyncio.CancelledError:
            self._queue.drop(client, lookup)
            raise

    def _start(self) -> None:
        """Start the threads, when there is something to look up for the first time."""
        with self._lock:
            if self._threads:
                return
            self._threads = [
                threading.Thread(target=self._work, name=f'vico-resolve-{number}', daemon=True)
                for number in range(THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        while (taken := self._queue.take()) is not None:
            client, lookup = taken
            if lookup.found.set_running_or_notify_cancel():
                try:
                    lookup.found.set_result(_look_up(lookup.host, lookup.port))
                except BaseException as error:
                    lookup.found.set_exception(error)
            self._queue.done(client)

    def close(self) -> None:
        """Let the threads end, those that wait for a name server when it has answered."""
        for lookup in self._queue.close():
            lookup.found.cancel()


def _look_up(host: str, port: int) -> list[Address]:
    found: Sequence[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(kind, str(address[0])) for kind, _, _, _, address in found]
