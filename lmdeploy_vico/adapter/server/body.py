"""Reads the body of a request within bounds, before anything is made of it."""

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.media.errors import MediaBusyError, MediaError
from lmdeploy_vico.media.memory import MemoryBudget, MemoryShare

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

# Of a body's bytes, while it is served: the bytes, the text that JSON is parsed from, and what FastAPI and LMDeploy
# make of it, each for itself.
COPIES = 4


@dataclass(frozen=True)
class Bounds:
    """What the requests of a server may take.

    Attributes:
        memory: of all of them.
        max_body_bytes: of one.
    """

    memory: MemoryBudget
    max_body_bytes: int


class BodyTooLargeError(RequestError):
    """A body with more bytes than are accepted; answered with 413."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            ErrorCode.INVALID_REQUEST, f'The body of the request has more than {limit} bytes (option max_body_bytes).'
        )
        self.status_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


async def read_body(
    headers: list[tuple[bytes, bytes]], receive: Receive, share: MemoryShare, limit: int
) -> bytes | None:
    """Read the body of a request.

    Args:
        headers: of the request, as ASGI has them.
        receive: ASGI's.
        share: what the body takes memory of.
        limit: bytes.

    Returns:
        The body; None if the client left before it was complete.

    Raises:
        BodyTooLargeError: it is larger than ``limit``. Where its length is announced, nothing of it is read.
        OverloadError: there is no room for it now.
    """
    announced = next((value for name, value in headers if name == b'content-length'), b'')
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLargeError(limit)
    body = bytearray()
    while True:
        message = await receive()
        if message['type'] != 'http.request':
            return None
        part = message.get('body', b'')
        if len(body) + len(part) > limit:
            raise BodyTooLargeError(limit)
        try:
            share.take(COPIES * len(part))
        except MediaError:  # more than there is for all requests together
            raise BodyTooLargeError(limit) from None
        except MediaBusyError as error:
            raise OverloadError(str(error)) from error
        body += part
        if not message.get('more_body', False):
            return bytes(body)


def client_of(scope: MutableMapping[str, Any]) -> str:
    """Who sends a request: its API key, or else its address. It is compared, and never shown."""
    headers = dict(scope['headers'])
    key: bytes = headers.get(b'authorization') or headers.get(b'x-api-key') or b''
    return key.decode('latin-1') or (scope.get('client') or ('',))[0]
