"""Whose file is decoded next: clients take turns, however many files each of them has sent."""

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

J = TypeVar('J')


class FairQueue(Generic[J]):
    """Jobs of clients. Safe to use from several threads.

    A client with much to do has at most all workers but one at a time, so that what it sends, however long it takes,
    keeps nobody else waiting for more than one job of somebody.

    Args:
        workers: how many threads take jobs.
    """

    def __init__(self, workers: int) -> None:
        self._most = max(1, workers - 1)
        self._waiting: OrderedDict[str, deque[J]] = OrderedDict()  # the client whose turn it is first
        self._running: dict[str, int] = {}
        self._changed = threading.Condition()
        self._closed = False

    def put(self, client: str, job: J) -> None:
        """Add a job; raises RuntimeError once the queue is closed."""
        with self._changed:
            if self._closed:
                raise RuntimeError('the queue is closed')
            self._waiting.setdefault(client, deque()).append(job)
            self._changed.notify()

    def take(self) -> tuple[str, J] | None:
        """Wait for a job and return it with its client, whose turn comes last then; None once the queue is closed.

        It counts as one of the client's until :meth:`done`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._next() is not None)
            client = self._next()
            if self._closed or client is None:
                return None
            jobs = self._waiting[client]
            job = jobs.popleft()
            self._waiting.move_to_end(client)
            if not jobs:
                del self._waiting[client]
            self._running[client] = self._running.get(client, 0) + 1
            return client, job

    def _next(self) -> str | None:
        """The client whose turn it is."""
        return next((client for client in self._waiting if self._running.get(client, 0) < self._most), None)

    def done(self, client: str) -> None:
        """One of the client's jobs has ended."""
        with self._changed:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
            self._changed.notify_all()

    def drop(self, client: str, job: J) -> bool:
        """Take a job back; returns whether it was still waiting."""
        with self._changed:
            jobs = self._waiting.get(client)
            if jobs is None or job not in jobs:
                return False
            jobs.remove(job)
            if not jobs:
                del self._waiting[client]
            return True

    def close(self) -> list[J]:
        """Let nobody wait any longer; returns the jobs that waited."""
        with self._changed:
            self._closed = True
            left = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            self._changed.notify_all()
            return left
