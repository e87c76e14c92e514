"""What a request's JSON says beyond what LMDeploy reads of it: pictures in keys that it drops, and keys of ours.

LMDeploy's request models leave out every key that they do not know, and its adapters for other APIs every part.
"""

import hashlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError

from lmdeploy_vico.adapter.server.forms.parts import MEDIA_KEYS, anthropic_url
from lmdeploy_vico.adapter.server.served import served_request
from lmdeploy_vico.wording import shown

Body = Mapping[str, Any]

LONGEST_SALT = 128  # characters
OPTIONS = ('mm_processor_kwargs', 'media_io_kwargs')
# Arguments of LMDeploy's and transformers' functions beside the variables of a template. A client's own template could
# render nothing, which ends the engine, or go on rendering for ever.
NOT_OF_TEMPLATES = (
    'messages',
    'conversation',
    'tools',
    'chat_template',
    'add_generation_prompt',
    'continue_final_message',
    'sanitize_control_tokens',
    'tokenize',
    'padding',
    'truncation',
    'max_length',
    'return_tensors',
    'return_dict',
    'return_assistant_tokens_mask',
    'tokenizer_kwargs',
)
RESPONSES_TEXTS = ('input_text', 'output_text', 'text')
# Blocks of Anthropic's API that LMDeploy shows the model: as text, or as what they are.
BLOCKS = (
    'text',
    'image',
    'tool_use',
    'tool_result',
    'thinking',
    'redacted_thinking',
    'server_tool_use',
    'web_search_tool_result',
    'search_result',
    'mcp_tool_use',
)


def checking_bodies(validate: Callable[[Request], None], check: Callable[[Body], None]) -> Callable[..., Awaitable]:
    """Make a dependency of an endpoint that checks a request's whole body, before LMDeploy reads its part of it.

    Args:
        validate: LMDeploy's dependency, which checks the headers.
        check: what belongs to the endpoint; raises ValueError.
    """

    async def validate_json_request(raw_request: Request) -> None:
        validate(raw_request)
        body = await raw_request.json() if await raw_request.body() else None
        if not isinstance(body, Mapping):
            return  # LMDeploy says so
        try:
            salt = cache_salt(body)
            check(body)
        except ValueError as error:
            raise RequestValidationError([str(error)]) from None
        served = served_request()
        if served is not None:
            served.cache_salt = salt
            served.key = key_of(raw_request.headers)

    return validate_json_request


def cache_salt(body: Body) -> str:
    """The request's ``cache_salt``, empty if it has none; raises ValueError for what is none."""
    salt = body.get('cache_salt')
    if salt is None:
        return ''
    if not isinstance(salt, str) or not 0 < len(salt) <= LONGEST_SALT or not salt.isprintable():
        raise ValueError(f'cache_salt must be a text of 1 to {LONGEST_SALT} characters, not {shown(salt)}.')
    return salt


def key_of(headers: Mapping[str, str]) -> str:
    """A name for the API key of a request, from which the key cannot be told; empty without one."""
    key = headers.get('authorization', '').partition(' ')[2].strip() or headers.get('x-api-key', '')
    return hashlib.sha256(key.encode()).hexdigest() if key else ''


def check_chat(body: Body) -> None:
    """Check a request for /v1/chat/completions; its messages are checked where they are parsed."""
    _refuse_media_keys(body, 'image_data')
    options = body.get('chat_template_kwargs')
    reserved = [key for key in options if key in NOT_OF_TEMPLATES] if isinstance(options, Mapping) else []
    if reserved:
        raise ValueError(
            f'chat_template_kwargs are variables of the chat template; {shown(reserved[0])} is not one of them. The '
            'template is that of the server.'
        )


def check_generate(body: Body) -> None:
    """Check a request for /generate."""
    _refuse_media_keys(body, 'image_data')


def check_completions(body: Body) -> None:
    """Check a request for /v1/completions, which is about texts."""
    _refuse_media_keys(body)
    _refuse_options(body)


def check_messages(body: Body) -> None:
    """Check a request for /v1/messages."""
    _refuse_media_keys(body, 'image_data')
    _refuse_options(body)
    _check_conversation(body)


def check_count_tokens(body: Body) -> None:
    """Check a request for /v1/messages/count_tokens."""
    _refuse_media_keys(body)
    _refuse_options(body)
    _check_conversation(body)


def check_responses(body: Body) -> None:
    """Check a request for /v1/responses; other parts than texts are checked where its messages are parsed."""
    _refuse_media_keys(body)
    _refuse_options(body)
    for item in _objects(body.get('input')):
        forgotten = [key for key in item if key in MEDIA_KEYS and item[key] is not None]
        if forgotten:
            raise ValueError(f'{shown(forgotten[0])} is not a key of an input item; images are parts of its "content".')
        if item.get('role') in ('system', 'developer'):
            for part in _objects(item.get('content')):
                if part.get('type') not in RESPONSES_TEXTS:
                    raise ValueError(f'A {item["role"]} message has texts only, not parts of type {_type(part)}.')


def _refuse_media_keys(body: Body, *known: str) -> None:
    forgotten = [key for key in body if key in MEDIA_KEYS and key not in known and body[key] is not None]
    if forgotten:
        read = f'"{known[0]}", beside a raw prompt, and ' if known else ''
        raise ValueError(
            f'{shown(forgotten[0])} is not a key of this request. Images and videos are read from {read}the items of '
            'chat messages: {"type": "image_url", "image_url": {"url": ...}}.'
        )


def _refuse_options(body: Body) -> None:
    forgotten = [key for key in OPTIONS if body.get(key) is not None]
    if forgotten:
        raise ValueError(f'{forgotten[0]} is read by /v1/chat/completions and /generate, not by this endpoint.')


def _check_conversation(body: Body) -> None:
    """Check the blocks of Anthropic's messages: LMDeploy leaves some out, and writes the base64 of others as text."""
    for block in _objects(body.get('system')):
        _require_type(block, ('text',), 'A system prompt has')
    for message in _objects(body.get('messages')):
        role = message.get('role')
        for block in _objects(message.get('content')):
            if role == 'system':
                _require_type(block, ('text',), 'A system message has')
            _require_type(block, BLOCKS, 'A message has')
            _check_image(block)
            if block.get('type') == 'tool_result':
                for part in _objects(block.get('content')):
                    accepted = ('text', 'image') if role == 'user' else ('text',)
                    _require_type(part, accepted, f'A tool result of the role {shown(role)} has')
                    _check_image(part)


def _check_image(block: Body) -> None:
    if block.get('type') != 'image':
        return
    anthropic_url(block.get('source'))
    unknown = [key for key in block if key not in ('type', 'source', 'cache_control') and block[key] is not None]
    if unknown:
        raise ValueError(f'{shown(unknown[0])} is not a key of an image block; type, source, cache_control are.')


def _require_type(part: Body, accepted: tuple[str, ...], where: str) -> None:
    if part.get('type') not in accepted:
        raise ValueError(f'{where} no content of type {_type(part)}. Accepted: {", ".join(accepted)}.')


def _type(part: Body) -> str:
    return shown(part.get('type'))


def _objects(values: Any) -> Iterator[Body]:
    """The objects in a list; LMDeploy says what is wrong with anything else."""
    return (value for value in values if isinstance(value, Mapping)) if isinstance(values, list) else iter(())
