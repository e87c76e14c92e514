"""Cancels the vision work of requests whose client has closed the connection.

LMDeploy looks for a disconnect only when it has something to send. Until then an abandoned request would keep its place
in the vision stage's queue, and every request behind it would wait.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lmdeploy_vico.adapter.server.served import ServedRequest, T, Work, served_request, serving

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


_watching = False


def watch_clients() -> None:
    """Let the server of this process, which serves a ViCO model, notice clients that leave."""
    global _watching
    _watching = True


def watching_clients() -> bool:
    """Return whether a ViCO model has been started in this process."""
    return _watching


async def while_client_waits(start: 'Callable[[], Work[T]]') -> T:
    """Start work and return its result; cancel it when this task is cancelled, or when the client leaves.

    Args:
        start: starts the work; it is not called if the client has gone already.

    Raises:
        RequestError: the client has gone. Nobody reads the answer, but LMDeploy then logs no traceback.
        CancelledError: this task has been cancelled, or the work by somebody else.
    """
    request = served_request() or ServedRequest()
    _require_client(request)
    work = start()
    request.pending.add(work)
    waiting = asyncio.wrap_future(work)  # a task is returned as it is
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
    """ASGI middleware that waits for the client's disconnect as soon as it has read a request's body.

    The application reads its messages as before. Only one task may wait in a server's ``receive``, so the application
    hears of the disconnect from the task that waits here.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection. Anything but an HTTP request passes untouched."""
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        # Always a new one: the task of one request may start that of the next on the same connection.
        request = ServedRequest()
        listener = _Listener(receive, request.abandon)
        with serving(request):
            try:
                await self.app(scope, listener.receive, send)
            finally:
                await listener.close()


class _Listener:
    """Reads the messages of one request. After the body, a task of its own waits for the disconnect."""

    def __init__(self, receive: Receive, on_disconnect: Callable[[], None]) -> None:
        self._receive = receive
        self._on_disconnect = on_disconnect
        self._disconnect: asyncio.Task[Message] | None = None

    async def receive(self) -> Message:
        """Return the next part of the body; after the last one, return the disconnect to every call.

        If the client has gone, this returns without suspending: Starlette asks in a scope that is cancelled already.
        """
        if self._disconnect is not None:
            return await asyncio.shield(self._disconnect)  # the caller may be cancelled; the task goes on
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
