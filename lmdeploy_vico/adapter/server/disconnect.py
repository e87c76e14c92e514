"""Cancels the vision work of requests whose client has closed the connection.

LMDeploy looks for a disconnect only when it has something to send. Until then an abandoned request would keep its place
in the vision stage's queue, and every request behind it would wait.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.utils.server_utils import protocol_error_response

from lmdeploy_vico.adapter.server.body import Bounds, Message, Receive, client_of, read_body
from lmdeploy_vico.adapter.server.served import ServedRequest, T, Work, served_request, serving
from lmdeploy_vico.media.memory import MemoryShare

Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


_bounds: Bounds | None = None


def watch_clients(bounds: Bounds) -> None:
    """Let the server of this process, which serves a ViCO model, notice clients that leave and bound what they send."""
    global _bounds
    _bounds = bounds


def watched_bounds() -> Bounds | None:
    """Return the bounds of this process's server; None unless a ViCO model has been started in it."""
    return _bounds


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
        raise RequestError(ErrorCode.REQUEST_CANCELLED, 'The client closed the connection.')


class DisconnectMiddleware:
    """ASGI middleware that reads a request's body, within bounds, and from then on waits for the client's disconnect.

    The application reads its messages as before. Only one task may wait in a server's ``receive``, so the application
    hears of the disconnect from the task that waits here.
    """

    def __init__(self, app: App, bounds: Bounds) -> None:
        self.app = app
        self._bounds = bounds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection. Anything but an HTTP request passes untouched."""
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        # Always a new one: the task of one request may start that of the next on the same connection.
        share = MemoryShare(self._bounds.memory)
        request = ServedRequest(client=client_of(scope), body=share)
        with share.in_use():  # the body is kept until the answer has been sent
            try:
                body = await read_body(scope['headers'], receive, share, self._bounds, request.client)
            except RequestError as error:
                await protocol_error_response(scope['path'], error)(scope, receive, send)
                return
            if body is None:
                return
            listener = _Listener(body, receive, request.abandon)
            del body
            with serving(request):
                try:
                    await self.app(scope, listener.receive, send)
                finally:
                    await listener.close()


class _Listener:
    """Hands on the body of a request, while a task waits for the disconnect."""

    def __init__(self, body: bytes, receive: Receive, on_disconnect: Callable[[], None]) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._on_disconnect = on_disconnect
        self._disconnect: asyncio.Task[Message] = asyncio.create_task(self._listen())

    async def receive(self) -> Message:
        """Return the body; to every later call the disconnect.

        If the client has gone, this returns without suspending: Starlette asks in a scope that is cancelled already.
        """
        if self._body is None:
            return await asyncio.shield(self._disconnect)  # the caller may be cancelled; the task goes on
        body, self._body = self._body, None
        return {'type': 'http.request', 'body': body, 'more_body': False}

    async def _listen(self) -> Message:
        while (message := await self._receive())['type'] != 'http.disconnect':
            pass
        self._on_disconnect()
        return message

    async def close(self) -> None:
        """End the task; the request has been served."""
        self._disconnect.cancel()
        await asyncio.gather(self._disconnect, return_exceptions=True)
