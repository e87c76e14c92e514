"""Whether a server takes requests, and what it does before it ends."""

import asyncio
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

logger = logging.getLogger(__name__)

ENGINE_DIED = 'The inference engine has ended, and the server is about to end, too. Try again later.'
ENGINE_DIED_STAYS = 'The inference engine has ended. The server has to be restarted.'
STOPPING = 'The server is shutting down. Try again later.'
ENGINE_STOPPED = 'The process of the inference engine has been stopped (SIGSTOP). It goes on after SIGCONT.'
ENGINE_PROCESS = 'mp_engine_proc'  # what LMDeploy calls it
EXIT_STATUS = 1  # not that of a signal: supervisors take SIGTERM for a wanted end
RETRY_AFTER = 5  # seconds, in which a supervisor may have started another server
LAST_WORDS = 0.2  # seconds for what has been sent to leave


class Lifecycle:
    """One server's.

    Args:
        grace: seconds that running requests have when the server is told to stop, or its engine has died.
        exits: whether the process ends when its engine has died.
        leave: ends the process at once, with a status.
    """

    def __init__(self, grace: float, exits: bool, leave: Callable[[int], Any] = os._exit) -> None:
        self._grace, self._exits, self._leave = grace, exits, leave
        self._running = 0
        self._idle: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self.dead = self.stopping = False

    def attach(self) -> None:
        """Note the event loop that serves; called in it before anything else."""
        if self._loop is None:
            self._loop, self._idle = asyncio.get_running_loop(), asyncio.Event()
            self._idle.set()

    def refusal(self) -> str | None:
        """Why no request is taken; None while they are."""
        if self.stopping:
            return STOPPING
        if self.dead:
            return ENGINE_DIED if self._exits else ENGINE_DIED_STAYS
        return None

    def illness(self) -> str | None:
        """Why the server is not well, though its requests are taken; None while it is."""
        for child in multiprocessing.active_children():
            if child.name == ENGINE_PROCESS and _is_stopped(child.pid):
                return ENGINE_STOPPED
        return None

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request runs inside."""
        assert self._idle is not None
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def engine_died(self) -> None:
        """The engine's process has ended by itself; called in the event loop, before its requests are told."""
        if self.dead or self.stopping:
            return
        self.dead = True
        logger.critical('the engine process has ended')
        logging.getLogger('lmdeploy').addFilter(_is_news)
        if self._exits and self._loop is not None:
            self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        await self._wait_for_requests()
        await asyncio.sleep(LAST_WORDS)
        logger.critical('the server ends with status %d, to be restarted', EXIT_STATUS)
        self._leave(EXIT_STATUS)

    def stop(self, server: Any, go_on: Callable[[], Any]) -> None:
        """Answer what runs, and then let the server stop; called by its handler of signals.

        Args:
            server: uvicorn's.
            go_on: what the handler does otherwise.
        """
        if self.stopping or self._loop is None or not self._running:
            self.stopping = True
            go_on()
            return
        self.stopping = True
        logger.warning('shutting down: %d requests have %g s', self._running, self._grace)
        self._loop.call_soon_threadsafe(self._drain, server, go_on)

    def _drain(self, server: Any, go_on: Callable[[], Any]) -> None:
        async def drain() -> None:
            if not await self._wait_for_requests():
                logger.warning('%d requests end without an answer', self._running)
                server.config.timeout_graceful_shutdown = 0
            go_on()

        assert self._loop is not None
        self._ending = self._loop.create_task(drain())

    async def _wait_for_requests(self) -> bool:
        """Return whether all requests have been answered, within the grace."""
        assert self._idle is not None
        try:
            await asyncio.wait_for(self._idle.wait(), self._grace)
        except asyncio.TimeoutError:  # Python 3.10 has another of that name
            return False
        return True


def _is_stopped(pid: int | None) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out the tracebacks, some three for each request, that say again that the engine has died."""
    # There already: it is its error. This module is imported where the engine is not.
    from lmdeploy.pytorch.engine.mp_engine.zmq_rpc import RPCServerDeadError

    error = record.exc_info[1] if record.exc_info else None
    return not any(isinstance(one, RPCServerDeadError) for one in (error, getattr(error, '__cause__', None)))


_current: Lifecycle | None = None


def set_lifecycle(lifecycle: Lifecycle | None) -> None:
    """Make it that of this process's server, which serves a ViCO model."""
    global _current
    _current = lifecycle


def lifecycle() -> Lifecycle | None:
    """That of this process's server; None unless it serves a ViCO model."""
    return _current
