"""How many connections a server takes, so that it never runs out of file descriptors.

A server without descriptors accepts nobody, /health included, and asyncio logs thousands of tracebacks a second.
"""

import asyncio
import logging
import os
import resource
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

WANTED = 65536  # descriptors, if the hard limit allows as many
RESERVE = 128  # descriptors for what is fetched, decoded and handed to the engine; of few at most half
SHARE_OF_BURST = 8  # a burst of new connections is taken in one piece, and counted only two steps of the loop later
SECONDS_BETWEEN_LOGS = 10.0
FEWEST = 64  # connections, below which the operator is told at start
REFUSAL = (
    b'HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n'
    b'content-length: %d\r\n\r\n%s'
)
BODY = (
    b'{"message":"The server has as many connections as it can take. Try again later.","type":"server_error",'
    b'"code":503,"param":null,"object":"error"}'
)


class ConnectionBound:
    """What the descriptors of this process allow.

    Args:
        free: descriptors that connections may take.

    Attributes:
        most: open connections; a further one is told to try again.
        backlog: connections that are accepted in one piece.
    """

    def __init__(self, free: int) -> None:
        self.backlog = max(1, free // SHARE_OF_BURST)
        self.most = max(1, free - 3 * self.backlog)
        self._refused = 0
        self._logged = -SECONDS_BETWEEN_LOGS

    def note_refusal(self, now: float) -> None:
        """Log that connections are refused, at most every few seconds."""
        self._refused += 1
        if now - self._logged >= SECONDS_BETWEEN_LOGS:
            logger.warning(
                '%d connections refused: %d are open, as many as the limit of open files allows (ulimit -n)',
                self._refused,
                self.most,
            )
            self._refused, self._logged = 0, now


def bound_of_this_process() -> ConnectionBound:
    """Raise the limit of open files as far as allowed, and share out what is free of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    limit = WANTED if soft == resource.RLIM_INFINITY else soft
    unused = limit - len(os.listdir('/proc/self/fd'))
    bound = ConnectionBound(unused - min(RESERVE, unused // 2))
    if bound.most < FEWEST:
        logger.warning('only %d connections at a time: raise the limit of open files (ulimit -n)', bound.most)
    return bound


class _Refused(asyncio.Protocol):
    """A connection that is one too many."""

    def __init__(self, bound: ConnectionBound) -> None:
        self._bound = bound

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._bound.note_refusal(time.monotonic())
        transport.write(REFUSAL % (len(BODY), BODY))
        transport.close()


def bounded(protocol: Callable[..., asyncio.Protocol], bound: ConnectionBound) -> Callable[..., asyncio.Protocol]:
    """Return what makes a connection's protocol, one that refuses it where the bound is reached.

    Args:
        protocol: uvicorn's, called with ``server_state``, which has the open connections.
        bound: of the process.
    """

    def make(*args: Any, server_state: Any, **kwargs: Any) -> asyncio.Protocol:
        if len(server_state.connections) >= bound.most:
            return _Refused(bound)
        return protocol(*args, server_state=server_state, **kwargs)

    return make
