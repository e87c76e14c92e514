"""Requests whose client has gone: noticed while their images are still being decoded and encoded.

LMDeploy looks for a disconnect only when it has something to send. Until then an abandoned request would keep its place
in the vision stage's queue, and every request behind it waiting.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lmdeploy_vico.adapter.server.pixels import PixelShare
from lmdeploy_vico.stage.queue import Admission

T = TypeVar('T')
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Work = Future[T] | asyncio.Task[T]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


@dataclass
class ServedRequest:
    """What the adapter keeps of an HTTP request. One object for all choices of a request with ``n`` above 1.

    Attributes:
        client_gone: whether the connection has been closed.
        image_tokens: visual tokens of its prompt.
        pending: what its client's leaving cancels.
        admission: the place in the vision stage that is held while it is prepared.
        preparing: how many of its choices are being prepared.
        pixels: what its decoded images take of the server's memory for them.
    """

    client_gone: bool = False
    image_tokens: int = 0
    pending: 'set[Work[Any]]' = field(default_factory=set)
    admission: Admission | None = None
    preparing: int = 0
    pixels: PixelShare | None = None

    def abandon(self) -> None:
        """The client has gone: cancel what is done for it."""
        self.client_gone = True
        for future in tuple(self.pending):
            future.cancel()


_served: ContextVar[ServedRequest | None] = ContextVar('vico_served_request', default=None)
_watching = False


def served_request() -> ServedRequest | None:
    """The HTTP request that this task, or the one that started it, serves; None outside a server."""
    return _served.get()


def watch_clients() -> None:
    """Have the server of this process, which serves a ViCO model, notice clients that leave."""
    global _watching
    _watching = True


def watching_clients() -> bool:
    """Whether a ViCO model has been started in this process."""
    return _watching


async def while_client_waits(start: 'Callable[[], Work[T]]') -> T:
    """What the work results in, which is cancelled with this task, or when the client leaves.

    Args:
        start: starts the work; not called if the client has gone already.

    Raises:
        RequestError: the client has gone. Nobody reads the answer, but LMDeploy ends the request without a traceback.
        CancelledError: this task has been cancelled, or the work by somebody else.
    """
    request = served_request() or ServedRequest()
    _require_client(request)
    work = start()
    request.pending.add(work)
    waiting = asyncio.wrap_future(work)  # nothing but the task itself, if it is one
    try:
        # Unlike awaiting it, this raises CancelledError only if this task is cancelled.
        await asyncio.wait([waiting])
    finally:
        request.pending.discard(work)
        waiting.cancel()  # and the work with it, unless they are done
    try:
        if waiting.cancelled():
            _require_client(request)
        return waiting.result()
    finally:
        # An error of the work refers to this frame. If this frame referred to it too, what it has seen, decoded images
        # among it, would not be freed before Python looks for cycles.
        del work, waiting


def _require_client(request: ServedRequest) -> None:
    if request.client_gone:
        from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

        raise RequestError(ErrorCode.REQUEST_CANCELLED, 'The client closed the connection.')


class DisconnectMiddleware:
    """ASGI middleware that listens for the client's leaving from the end of a request's body on.

    The application reads its messages as before. Where it would have waited for the disconnect, it is told by the one
    task that does: a server's ``receive`` is not made for several listeners.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection; other than HTTP requests pass untouched."""
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        request = ServedRequest()
        # Never left over from another: the task of one request may start that of the next on the same connection.
        _served.set(request)
        listener = _Listener(receive, request.abandon)
        try:
            await self.app(scope, listener.receive, send)
        finally:
            await listener.close()


class _Listener:
    """The messages of one request; what comes after its body is waited for in a task of its own."""

    def __init__(self, receive: Receive, on_disconnect: Callable[[], None]) -> None:
        self._receive = receive
        self._on_disconnect = on_disconnect
        self._disconnect: asyncio.Task[Message] | None = None

    async def receive(self) -> Message:
        """The next message: the parts of the body, then, however often asked, the disconnect.

        If the client has gone it is returned without suspending: Starlette asks in a scope that is cancelled already.
        """
        if self._disconnect is not None:
            return await asyncio.shield(self._disconnect)  # who asks may be cancelled, the listening goes on
        message = await self._receive()
        if message['type'] == 'http.request' and not message.get('more_body', False):
            self._disconnect = asyncio.create_task(self._listen())
        return message

    async def _listen(self) -> Message:
        while (message := await self._receive())['type'] != 'http.disconnect':
            pass
        self._on_disconnect()
        return message

    async def close(self) -> None:
        """End the task; the request has been served."""
        if self._disconnect is not None:
            self._disconnect.cancel()
            await asyncio.gather(self._disconnect, return_exceptions=True)
