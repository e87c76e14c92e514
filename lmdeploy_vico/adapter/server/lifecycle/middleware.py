"""Refuses requests that come when the server is about to end, and counts those that run."""

from typing import Any

from lmdeploy.serve.utils.server_utils import protocol_error_response

from lmdeploy_vico.adapter.server.lifecycle.state import RETRY_AFTER, Lifecycle
from lmdeploy_vico.adapter.server.overload import OverloadError

HEALTH = '/health'


class LifecycleMiddleware:
    """ASGI middleware: 503 with ``Retry-After`` instead of a request, and of the health, while no request is taken.

    Args:
        app: what serves.
        lifecycle: of the server.
    """

    def __init__(self, app: Any, lifecycle: Lifecycle) -> None:
        self.app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        self._lifecycle.attach()
        if scope['type'] != 'http' or (scope['method'] != 'POST' and scope['path'] != HEALTH):
            await self.app(scope, receive, send)
            return
        refusal = self._lifecycle.refusal()
        if refusal is None and scope['path'] == HEALTH:
            refusal = self._lifecycle.illness()
        if refusal is not None:
            error = OverloadError(refusal)
            error.retry_after = RETRY_AFTER
            await protocol_error_response(scope['path'], error)(scope, receive, send)
            return
        with self._lifecycle.request():
            await self.app(scope, receive, send)
