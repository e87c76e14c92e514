"""``/v1/messages/count_tokens``: the number of tokens that ``/v1/messages`` would count, images and tools included."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request
from lmdeploy.serve.anthropic import errors
from lmdeploy.serve.anthropic.adapter import get_model_list, to_openai_messages, to_openai_tools
from lmdeploy.serve.anthropic.endpoints.validation import _validate_headers
from lmdeploy.serve.anthropic.protocol import CountTokensRequest, CountTokensResponse
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.openai.protocol import ChatCompletionRequest
from lmdeploy.serve.utils.server_utils import validate_json_request

from lmdeploy_vico.adapter.server.forms.body import check_count_tokens, checking_bodies
from lmdeploy_vico.adapter.server.served import leave_alone
from lmdeploy_vico.wording import shown


def add_endpoint(router: APIRouter, server_context: Any, merge_inline_system: bool) -> None:
    """Add the endpoint to LMDeploy's router.

    The prompt is prepared as if it were to be answered: images are decoded, encoded and routed, in the same queue and
    within the same limits. Their tiles are then in the cache for the message itself. Nothing more is compressed for it
    while the language model is overloaded, as nothing is asked of that.
    """
    check = checking_bodies(validate_json_request, check_count_tokens)

    @router.post('/v1/messages/count_tokens', dependencies=[Depends(check)])
    async def count_tokens(request: CountTokensRequest, raw_request: Request) -> Any:
        error = _validate_headers(raw_request)
        if error is not None:
            return error
        if request.model not in get_model_list(server_context):
            message = f'The model {shown(request.model)} does not exist.'
            return errors.create_error_response(HTTPStatus.NOT_FOUND, message, error_type='not_found_error')
        try:
            tokens = await _count(request, server_context, merge_inline_system)
        except RequestError as error:
            return errors.create_request_error_response(error)
        return CountTokensResponse(input_tokens=tokens).model_dump()


async def _count(request: CountTokensRequest, server_context: Any, merge_inline_system: bool) -> int:
    engine = server_context.async_engine
    try:
        asked = ChatCompletionRequest(
            model=request.model,
            messages=to_openai_messages(request, merge_inline_system=merge_inline_system),
            tools=to_openai_tools(request.tools),
        )
        asked = server_context.response_parser_cls(asked).request
    except ValueError as error:
        raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from error
    leave_alone()
    session = server_context.create_session()
    prepared = await engine.preprocess(
        asked.messages,
        session,
        tools=asked.tools,
        adapter_name=None if request.model == engine.model_name else request.model,
    )
    prepared.inputs.clear()  # it is not going to be answered
    server_context.session_manager.remove(session)
    return prepared.input_token_len
