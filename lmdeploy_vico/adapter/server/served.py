"""What the server holds for a request that it serves: its client, a place in the vision stage, memory for pictures.

A place in the stage counts tiles, which says nothing about memory: an image of one tile may have 177 million pixels, in
a file of half a megabyte.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.media.memory import MemoryBudget, MemoryShare
from lmdeploy_vico.stage.queue import Admission, StageBusyError

if TYPE_CHECKING:
    from lmdeploy_vico.stage.stage import VisionStage

T = TypeVar('T')
Work = Future[T] | asyncio.Task[T]


@dataclass
class ServedRequest:
    """What the server holds for an HTTP request. All choices of a request with ``n`` above 1 share one object.

    Attributes:
        client: its API key, or else its address: each client gets a fair share of what fetches and decodes.
        client_gone: whether the client has closed the connection.
        tile_tokens: visual tokens of each tile of its prompt.
        pending: work that is cancelled when the client leaves.
        admission: the place in the vision stage that is held while the request is prepared.
        preparing: how many of its choices are being prepared.
        pixels: what its pictures take of the server's memory for what clients send.
        body: what its body takes of the same.
        cache_salt: what keeps its images apart in all caches; empty for requests that share theirs.
        key: names the API key that it came with; empty without one.
        extra_share: of its tiles, compressed because the language model is overloaded; None until that is decided.
        pressed_tiles: how many of its tiles these are.
    """

    client: str = ''
    client_gone: bool = False
    tile_tokens: Sequence[int] = ()
    pending: set[Work[Any]] = field(default_factory=set)
    admission: Admission | None = None
    preparing: int = 0
    pixels: MemoryShare | None = None
    body: MemoryShare | None = None
    cache_salt: str = ''
    key: str = ''
    extra_share: float | None = None
    pressed_tiles: int = 0

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


def leave_alone() -> None:
    """Have nothing more compressed for the request that is served, however overloaded the language model is."""
    request = served_request()
    if request is not None:
        request.extra_share = 0.0


@asynccontextmanager
async def admitted(stage: 'VisionStage', tiles: int, budget: MemoryBudget) -> AsyncIterator[None]:
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
    share = request.pixels = request.pixels or MemoryShare(budget, request.body)
    request.preparing += 1
    try:
        with serving(request), share.in_use():
            yield
    finally:
        request.preparing -= 1
        if not request.preparing:
            request.admission = None
            stage.release(admission)
