"""Names each request: by the ``X-Request-Id`` of its client, or of a proxy, or by one that is made up."""

import logging
import re
import uuid
from typing import Any

from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.utils.server_utils import protocol_error_response

from lmdeploy_vico.log import about
from lmdeploy_vico.wording import shown

HEADER = b'x-request-id'
ACCEPTED = re.compile(rb'[\w.:/+=@-]{1,128}')  # what can stand in a line of the log, and in a header

logger = logging.getLogger(__name__)


class NamingMiddleware:
    """ASGI middleware: the id of a request stands in its answer's headers, and in what is logged about it.

    An id that could spoil a line of the log is replaced, and a path is quoted, as both are written by clients. What
    fails by the server's fault is logged. What LMDeploy, which has no such ids, logs about it stands just before, and
    uvicorn's traceback of an exception that nothing has caught just after.

    Args:
        app: what serves.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope['headers'] if name == HEADER), b'')
        name = given if ACCEPTED.fullmatch(given) else uuid.uuid4().hex.encode()

        begun = False

        async def answer(message: Any) -> None:
            nonlocal begun
            if message['type'] == 'http.response.start':
                begun = True
                others = [header for header in message.get('headers', ()) if header[0].lower() != HEADER]
                message = {**message, 'headers': [*others, (HEADER, name)]}
                if message['status'] >= 500:
                    logger.warning('%s %s: status %d', scope['method'], shown(scope['path']), message['status'])
            await send(message)

        with about(name.decode()):
            try:
                await self.app(scope, receive, answer)
            except Exception as error:
                kind = type(error).__name__
                logger.error('%s %s: nothing has caught a %s', scope['method'], shown(scope['path']), kind)
                if not begun:
                    # Starlette would answer further out, without the id.
                    failure = RequestError(ErrorCode.INTERNAL_ERROR)
                    await protocol_error_response(scope['path'], failure)(scope, receive, answer)
                raise  # as Starlette does: uvicorn logs the traceback, and closes the connection
