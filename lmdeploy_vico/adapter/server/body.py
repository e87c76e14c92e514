"""Reads the body of a request within bounds, before anything is made of it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.utils.server_utils import AuthenticationMiddleware

from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.media.errors import MediaBusyError, MediaError
from lmdeploy_vico.media.memory import MemoryBudget, MemoryShare

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

# Of a body's bytes, while it is served: the bytes, the text that JSON is parsed from, and what FastAPI and LMDeploy
# make of it, each for itself.
COPIES = 4
SHARE = 2  # bodies of one client that have not arrived may take one part in so many of the memory


@dataclass(frozen=True)
class Pace:
    """How fast a body has to arrive.

    Attributes:
        pause: seconds in which there has to be something new.
        head_start: seconds until the rate counts.
        rate: bytes a second.
    """

    pause: float = 20.0
    head_start: float = 60.0
    rate: float = 1 << 14

    def patience(self, since: float, received: int) -> float:
        """How many seconds to wait for more, so many after the beginning, with so many bytes there."""
        return min(self.pause, self.head_start + received / self.rate - since)


class Incoming:
    """What the bodies that have not arrived take, by client: none may fill the memory with them.

    Args:
        memory: for all requests.
    """

    def __init__(self, memory: MemoryBudget) -> None:
        self._most = None if memory.limit is None else memory.limit // SHARE
        self._taken: dict[str, list[int]] = {}  # bytes, bodies

    @contextmanager
    def of(self, client: str) -> Iterator[Callable[[int], None]]:
        """A body arrives inside; yields a function that is called with the bytes that each of its parts takes.

        It raises OverloadError where the bodies of this client take too much. A single one may take all there is.
        """
        taken = self._taken.setdefault(client, [0, 0])
        taken[1] += 1
        size = 0

        def take(more: int) -> None:
            nonlocal size
            if self._most is not None and taken[1] > 1 and taken[0] + more > self._most:
                raise OverloadError('Too many bodies of this client arrive at a time. Try again later.')
            size += more
            taken[0] += more

        try:
            yield take
        finally:
            taken[0] -= size
            taken[1] -= 1
            if not taken[1]:
                del self._taken[client]


@dataclass(frozen=True)
class Bounds:
    """What the requests of a server may take.

    Attributes:
        memory: of all of them.
        max_body_bytes: of one.
        pace: how fast a body has to arrive.
        incoming: of each client.
    """

    memory: MemoryBudget
    max_body_bytes: int
    pace: Pace = Pace()
    incoming: Incoming = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, 'incoming', Incoming(self.memory))


class BodyTooLargeError(RequestError):
    """A body with more bytes than are accepted; answered with 413."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            ErrorCode.INVALID_REQUEST, f'The body of the request has more than {limit} bytes (option max_body_bytes).'
        )
        self.status_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class BodyTooSlowError(RequestError):
    """A body that does not arrive; answered with 408."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.INVALID_REQUEST, 'The body of the request arrives too slowly. Send it again.')
        self.status_code = HTTPStatus.REQUEST_TIMEOUT


async def read_body(
    headers: list[tuple[bytes, bytes]], receive: Receive, share: MemoryShare, bounds: Bounds, client: str = ''
) -> bytes | None:
    """Read the body of a request.

    Args:
        headers: of the request, as ASGI has them.
        receive: ASGI's.
        share: what the body takes memory of.
        bounds: of the server.
        client: who sends it.

    Returns:
        The body; None if the client left before it was complete.

    Raises:
        BodyTooLargeError: it is larger than allowed. Where its length is announced, nothing of it is read.
        BodyTooSlowError: it does not arrive.
        OverloadError: there is no room for it now.
    """
    limit = bounds.max_body_bytes
    announced = next((value for name, value in headers if name == b'content-length'), b'')
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLargeError(limit)
    body = bytearray()
    clock = asyncio.get_running_loop().time
    began = clock()
    with bounds.incoming.of(client) as take:
        while True:
            message = await _next(receive, bounds.pace.patience(clock() - began, len(body)))
            if message['type'] != 'http.request':
                return None
            part = message.get('body', b'')
            if len(body) + len(part) > limit:
                raise BodyTooLargeError(limit)
            take(COPIES * len(part))
            try:
                share.take(COPIES * len(part))
            except MediaError:  # more than there is for all requests together
                raise BodyTooLargeError(limit) from None
            except MediaBusyError as error:
                raise OverloadError(str(error)) from error
            body += part
            if not message.get('more_body', False):
                return bytes(body)


async def _next(receive: Receive, seconds: float) -> Message:
    try:
        return await asyncio.wait_for(receive(), seconds)
    except asyncio.TimeoutError:  # Python 3.10 has another of that name
        raise BodyTooSlowError from None


def client_of(scope: MutableMapping[str, Any]) -> str:
    """Who sends a request: its API key where the server has keys, else its address. It is compared, and never shown.

    LMDeploy has checked the key by then: the first ``Authorization``, without the scheme. Where no keys are checked,
    everybody could invent as many as he likes.
    """
    middleware = scope['app'].user_middleware if 'app' in scope else ()
    if any(one.cls is AuthenticationMiddleware for one in middleware):
        header: bytes = next((value for name, value in scope['headers'] if name == b'authorization'), b'')
        key = header.partition(b' ')[2]
        if key:
            return 'key ' + key.decode('latin-1')
    return (scope.get('client') or ('',))[0]
