"""What the server holds for a request that it serves: its client, a place in the vision stage, memory for pictures.

A place in the stage counts tiles, which says nothing about memory: an image of one tile may have 177 million pixels, in
a file of half a megabyte. Memory is counted before a picture's pixels are decoded.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.stage.queue import Admission, StageBusyError

if TYPE_CHECKING:
    from lmdeploy_vico.stage.stage import VisionStage

T = TypeVar('T')
Work = Future[T] | asyncio.Task[T]


class TooLargeError(ValueError):
    """A request that needs more memory than there is for all of them; LMDeploy answers 400 with the message."""


class PixelBudget:
    """Memory for the decoded pictures of all requests. Safe to use from several threads.

    A request that finds no room is refused; it does not wait. Two requests that hold memory and wait for more could
    wait for each other.

    Args:
        limit: bytes, None for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.taken = 0
        self.lock = threading.Lock()


class PixelShare:
    """What the pictures of one request take of the budget.

    All of it is given back at once, when the request is no longer prepared and the last thread that decodes for it has
    ended. Decoding cannot be interrupted, so it goes on for a while after a client has left.
    """

    def __init__(self, budget: PixelBudget) -> None:
        self._budget = budget
        self._size = self._users = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give nothing back before this block ends."""
        with self._budget.lock:
            self._users += 1
        try:
            yield
        finally:
            with self._budget.lock:
                self._users -= 1
                if not self._users:
                    self._budget.taken -= self._size
                    self._size = 0

    def take(self, size: int) -> None:
        """Count ``size`` more bytes.

        Raises:
            TooLargeError: the request alone exceeds the limit.
            OverloadError: together with the requests that are being prepared, it exceeds the limit.
        """
        budget = self._budget
        with budget.lock:
            if budget.limit is not None:
                if self._size + size > budget.limit:
                    raise TooLargeError(
                        f'Decoded, the images and videos of the request take at least {self._size + size} bytes of '
                        f'memory, more than the limit of {budget.limit} (option max_decoded_bytes).'
                    )
                if budget.taken + size > budget.limit:
                    raise OverloadError(
                        f'Decoded images and videos take {budget.taken} bytes of memory, and {size} more would exceed '
                        f'the limit of {budget.limit} (option max_decoded_bytes). Try again later.'
                    )
            budget.taken += size
            self._size += size


@dataclass
class ServedRequest:
    """What the server holds for an HTTP request. All choices of a request with ``n`` above 1 share one object.

    Attributes:
        client_gone: whether the client has closed the connection.
        image_tokens: visual tokens of its prompt.
        pending: work that is cancelled when the client leaves.
        admission: the place in the vision stage that is held while the request is prepared.
        preparing: how many of its choices are being prepared.
        pixels: what its decoded pictures take of the server's memory for them.
        cache_salt: what keeps its images apart in all caches; empty for requests that share theirs.
        key: names the API key that it came with; empty without one.
    """

    client_gone: bool = False
    image_tokens: int = 0
    pending: set[Work[Any]] = field(default_factory=set)
    admission: Admission | None = None
    preparing: int = 0
    pixels: PixelShare | None = None
    cache_salt: str = ''
    key: str = ''

    def abandon(self) -> None:
        """Cancel all work for the request: its client has gone."""
        self.client_gone = True
        for future in tuple(self.pending):
            future.cancel()


_current: ContextVar[ServedRequest | None] = ContextVar('vico_served_request', default=None)


def served_request() -> ServedRequest | None:
    """Return the request that this task, or the task that started it, serves; None outside of requests."""
    return _current.get()


@contextmanager
def serving(request: ServedRequest) -> Iterator[None]:
    """Make ``request`` the one that :func:`served_request` returns inside."""
    token = _current.set(request)
    try:
        yield
    finally:
        _current.reset(token)


@asynccontextmanager
async def admitted(stage: 'VisionStage', tiles: int, budget: PixelBudget) -> AsyncIterator[None]:
    """Hold a place in the stage, and memory for pictures, for the request that is prepared inside.

    All choices of a request with ``n`` above 1 share one place, because their images are the same. Each choice decodes
    the images again, so their memory adds up. Outside of a server every call stands for a request of its own.

    Args:
        stage: where the images are going to be encoded.
        tiles: an estimate of their number.
        budget: memory for the decoded pictures of all requests.

    Raises:
        OverloadError: too many tiles are waiting already.
    """
    request = served_request() or ServedRequest()
    try:
        admission = request.admission = request.admission or stage.admit(tiles)
    except StageBusyError as error:
        raise OverloadError(str(error)) from error
    share = request.pixels = request.pixels or PixelShare(budget)
    request.preparing += 1
    try:
        with serving(request), share.in_use():
            yield
    finally:
        request.preparing -= 1
        if not request.preparing:
            request.admission = None
            stage.release(admission)


@contextmanager
def decoding() -> Iterator[None]:
    """Keep the memory of a request's pictures counted until this block ends.

    A thread that decodes for a request, in a copy of its context, needs this: it cannot be interrupted, and goes on for
    a while after the request has ended.
    """
    request = served_request()
    if request is None or request.pixels is None:
        yield
        return
    with request.pixels.in_use():
        yield


def charge(size: int) -> None:
    """Count ``size`` bytes that are about to be decoded for the request that is served, if there is one.

    Raises:
        TooLargeError, OverloadError: there is no room for them; see :meth:`PixelShare.take`.
    """
    request = served_request()
    if request is not None and request.pixels is not None:
        request.pixels.take(size)
