"""``GET /vico``, the page, and ``POST /vico/route``: what the router makes of pictures, without the language model."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.utils.server_utils import protocol_error_response

from lmdeploy_vico.adapter.server.disconnect import while_client_waits
from lmdeploy_vico.adapter.server.media import MediaParser
from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.page.html import PATH, headers, page
from lmdeploy_vico.adapter.server.served import leave_alone
from lmdeploy_vico.stage.errors import EncodingError
from lmdeploy_vico.stage.queue import StageBusyError
from lmdeploy_vico.vision.routing import as_json
from lmdeploy_vico.wording import shown

if TYPE_CHECKING:
    from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel

ROUTE = f'{PATH}/route'
KEYS = ('images', 'compression', 'max_dynamic_patch')

_offered: 'VicoVisionModel | None' = None


def offer_page(model: 'VicoVisionModel') -> None:
    """Let the server of this process, which serves ``model``, have the page."""
    global _offered
    _offered = model


def is_open(scope: Mapping[str, Any]) -> bool:
    """Whether a connection asks for what needs no API key: the page itself, which holds no data."""
    if _offered is None or scope['type'] != 'http' or scope['method'] not in ('GET', 'HEAD'):
        return False
    return bool(scope['path'].removeprefix(scope.get('root_path', '')) == PATH)


def add_page(app: FastAPI) -> None:
    """Add both routes to a server's application, if it offers the page."""
    model = _offered
    if model is None:
        return

    async def show() -> Response:
        return Response(page(), media_type='text/html; charset=utf-8', headers=dict(headers()))

    async def route(request: Request) -> Response:
        return await _answer(model, request)

    app.add_api_route(PATH, show, methods=['GET', 'HEAD'], include_in_schema=False)
    app.add_api_route(ROUTE, route, methods=['POST'], summary='What the router makes of pictures')


async def _answer(model: 'VicoVisionModel', request: Request) -> Response:
    try:
        return JSONResponse(await _routed(model, await request.body()))
    except ValueError as error:
        failure = RequestError(ErrorCode.INVALID_REQUEST, str(error))
    except StageBusyError as error:
        failure = OverloadError(str(error))
    except EncodingError as error:
        failure = RequestError(ErrorCode.INTERNAL_ERROR, str(error))
    except RequestError as error:
        failure = error
    response = protocol_error_response(ROUTE, failure)
    if isinstance(failure, OverloadError):
        response.headers['Retry-After'] = str(failure.retry_after)
    return response


async def _routed(model: 'VicoVisionModel', body: bytes) -> dict[str, Any]:
    """Load, encode and route the pictures of a body, as those of one prompt, within all limits of a prompt."""
    messages, options = _asked(body)
    leave_alone()
    parsed = model.parse(messages, None, options)
    assert parsed is not None
    async with model.admit(parsed):
        request = await MediaParser(model.loader, model.media_store)(parsed, None, model.allowed_media_domains)
        jobs = request.pictures
        encoded = await while_client_waits(lambda: model.stage.submit(jobs, request.compression))
    thresholds = model.thresholds
    return {
        'images': [
            as_json(job.grid, one.tokens.scores, one.tokens.tile_tokens) for job, one in zip(jobs, encoded, strict=True)
        ],
        'relative_threshold': thresholds[0],
        'absolute_threshold': thresholds[1],
        'routing_scope': model.rules.routing_scope,
    }


def _asked(body: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages and options of a chat request with the same pictures.

    Raises:
        ValueError: the body is no such request; what is in its pictures is checked as in a chat request.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError('The body must be JSON.') from None
    images = asked.get('images') if isinstance(asked, dict) else None
    if not isinstance(images, list) or not images:
        raise ValueError('The body must be {"images": [...]} with one URL or more, each as in an "image_url".')
    unknown = [key for key in asked if key not in KEYS]
    if unknown:
        raise ValueError(f'The body has the keys {", ".join(KEYS)}, and not {shown(unknown[0])}.')
    content = [{'type': 'image_url', 'image_url': {'url': one} if isinstance(one, str) else one} for one in images]
    options = {'image': {'compression': asked['compression']}} if asked.get('compression') is not None else {}
    if asked.get('max_dynamic_patch') is not None:
        options['max_dynamic_patch'] = asked['max_dynamic_patch']
    return [{'role': 'user', 'content': content}], options
