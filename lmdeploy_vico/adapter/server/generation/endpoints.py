"""What the endpoints answer where LMDeploy's own code would let an error through."""

from typing import Any

import pydantic
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.utils.server_utils import protocol_error_response

CLIENTS = 'Request'  # the end of the names of the models that clients' requests are parsed into


def unsupported(message: str) -> RequestError:
    """A 400 that says what the server does not do."""
    return RequestError(ErrorCode.UNSUPPORTED_FEATURE, message)


def add_error_handlers(app: FastAPI) -> None:
    """Answer errors of requests, in the words of the endpoint's protocol, wherever an endpoint raises them."""
    app.add_exception_handler(RequestError, _answer)
    app.add_exception_handler(pydantic.ValidationError, _answer_invalid)


async def _answer(request: Request, error: Any) -> JSONResponse:
    return protocol_error_response(request.url.path, error)


async def _answer_invalid(request: Request, error: Any) -> JSONResponse:
    """An endpoint made another request of a client's; where it made a response, the server is at fault."""
    if not error.title.endswith(CLIENTS):
        raise error
    first = error.errors(include_url=False, include_input=False)[0]
    place = '.'.join(str(part) for part in first['loc'])
    # A message about a type may name the class.
    problem = 'must be an object' if first['type'] == 'model_type' else first['msg']
    message = f'{place or "A part of the request"}: {problem}'
    return await _answer(request, RequestError(ErrorCode.INVALID_REQUEST, message))
