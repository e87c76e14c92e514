"""What the server holds for a request that it serves: its client, a place in the vision stage, memory for pictures."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.pixels import PixelBudget, PixelShare
from lmdeploy_vico.stage.queue import Admission, StageBusyError

if TYPE_CHECKING:
    from lmdeploy_vico.stage.stage import VisionStage

T = TypeVar('T')
Work = Future[T] | asyncio.Task[T]


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
    """

    client_gone: bool = False
    image_tokens: int = 0
    pending: set[Work[Any]] = field(default_factory=set)
    admission: Admission | None = None
    preparing: int = 0
    pixels: PixelShare | None = None

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
