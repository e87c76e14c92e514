"""Changes to what LMDeploy reads of a request, and to what it says about a bad one, where a ViCO model is served.

LMDeploy answers a question about a picture without the picture where it does not know the picture's form.
"""

from collections.abc import Awaitable
from typing import Any

from lmdeploy_vico.patching import Call, Patch, Target, Trigger, register

_PROCESSOR = 'lmdeploy.serve.processors.multimodal:MultimodalProcessor'
_RESPONSES = 'lmdeploy.serve.openai.responses'
_ANTHROPIC = 'lmdeploy.serve.anthropic'
_BY_NAME = {  # the modules that import what checks a request's headers, and what is checked in their bodies
    'lmdeploy.serve.openai.chat_completions.serving': 'check_chat',
    'lmdeploy.serve.openai.endpoints.completions': 'check_completions',
    'lmdeploy.serve.openai.endpoints.generate': 'check_generate',
    f'{_RESPONSES}.serving': 'check_responses',
    f'{_ANTHROPIC}.endpoints.messages': 'check_messages',
}


async def parse_messages_first(call: Call) -> Any:
    """Parse every prompt before LMDeploy looks for images in it, and hand on what has been understood."""
    from lmdeploy_vico.adapter.server.forms.ids import stand_for_ids
    from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel

    processor, prompt = call.instance, call['prompt']
    model = VicoVisionModel.of(processor)
    if model is None:
        return await call.proceed()
    templated = call['do_preprocess'] and not stand_for_ids(prompt)
    request = model.parse(prompt, call['media_io_kwargs'], call['mm_processor_kwargs'], raw=not templated)
    if request is None:
        return await call.proceed()
    if request.ids is not None and not request.media:
        model.check_ids(request.ids)
        return {'prompt': None, 'input_ids': request.ids}
    try:
        if not request.media:
            return await call.proceed(prompt=request.texts())
        # As LMDeploy does for messages with images. What it takes for messages is our request.
        return await processor._get_multimodal_prompt_input(
            messages=request,
            do_preprocess=templated,
            adapter_name=call['adapter_name'],
            tools=call['tools'],
            chat_template_kwargs=call['chat_template_kwargs'],
        )
    except TypeError as error:  # LMDeploy would answer with its text, which is about functions and classes
        raise ValueError(
            'The messages cannot be rendered and tokenized: see that tool calls, tools and chat_template_kwargs have '
            'what the chat template expects, in Unicode.'
        ) from error


def check_whole_bodies(target: Target) -> None:
    """Refuse images in keys and forms that LMDeploy leaves out, and read ``cache_salt``."""
    from lmdeploy_vico.adapter.server.forms import body

    target.replace(body.checking_bodies(target.value, getattr(body, _BY_NAME[target.owner.__name__])))


async def tokenize_texts_in_threads(call: Call) -> Any:
    """Render and tokenize a prompt without images in a thread."""
    from lmdeploy_vico.adapter.patches.server import vico_model

    model = vico_model(call.instance)
    return await (call.proceed() if model is None else model.in_thread(call.proceed))


def encode_texts_in_threads(call: Call) -> None:
    """Tokenize the texts of ``/v1/encode`` in threads."""
    call.proceed()
    if register.reached(Trigger.MODEL):
        from lmdeploy_vico.adapter.server.forms.texts import encode_in_threads

        encode_in_threads(call['router'])


def tell_ids_from_texts(call: Call) -> Any:
    """Mark the ``input_ids`` of a request, which LMDeploy puts in the place of a text if there are images."""
    from lmdeploy_vico.adapter.server.forms.ids import mark_ids

    mark_ids(call['request'])
    return call.proceed()


def read_whole_input_items(target: Target) -> None:
    """Keep every key of the input items of ``/v1/responses``."""
    from pydantic.fields import FieldInfo

    model = target.value
    model.model_fields['input'] = FieldInfo(annotation=str | list[dict[str, Any]] | None, default=None)
    model.model_rebuild(force=True)


def read_images_of_responses(call: Call) -> Any:
    """Hand on the parts of an input item that are no texts, to be parsed with the messages."""
    from lmdeploy_vico.adapter.server.forms.body import RESPONSES_TEXTS

    content = call['content']
    if isinstance(content, list) and any(
        isinstance(part, dict) and part.get('type') not in RESPONSES_TEXTS for part in content
    ):
        return content
    return call.proceed()


def count_what_is_billed(call: Call) -> None:
    """Count the tokens of images and tools in ``/v1/messages/count_tokens``."""
    if not register.reached(Trigger.MODEL):
        return call.proceed()
    from lmdeploy_vico.adapter.server.forms.count import add_endpoint

    return add_endpoint(call['router'], call['server_context'], call['merge_inline_system'])


def shorten_error_messages(call: Call) -> Any:
    """Answer with the beginning and the end of a long error message."""
    from lmdeploy_vico.wording import shortened

    return call.proceed(message=shortened(call['message'])) if register.reached(Trigger.MODEL) else call.proceed()


def shorten_errors_of_requests(call: Call) -> Any:
    """Answer with the beginning and the end of an error's long message."""
    from lmdeploy_vico.wording import shortened

    if register.reached(Trigger.MODEL):
        call['error'].message = shortened(call['error'].message)
    return call.proceed()


def name_no_classes(call: Call) -> Awaitable[Any]:
    """Name the place of an invalid value by the request's keys alone."""
    from fastapi.exceptions import RequestValidationError

    from lmdeploy_vico.adapter.server.forms.errors import plain_location

    errors = [plain_location(error) for error in call['exc'].errors()[:1]]
    return call.proceed(exc=RequestValidationError(errors))


_LONG = 'LMDeploy repeats in its messages what a client sent, megabytes of it if need be.'
_SHORT = "LMDeploy's messages are short."

PATCHES = (
    Patch(
        parse_messages_first,
        f'{_PROCESSOR}.get_prompt_input',
        '(self, prompt, do_preprocess, adapter_name=None, tools=None, reasoning_effort=None, '
        'chat_template_kwargs=None, media_io_kwargs=None, mm_processor_kwargs=None, **kwargs)',
        why='LMDeploy looks for the types of images that it knows. If it finds none, it leaves out all parts that are '
        'not text, and does not look at the options for images.',
        until='LMDeploy refuses parts of messages that it does not understand, and knows the same forms.',
        process='server',
        uses={
            f'{_PROCESSOR}._get_multimodal_prompt_input': '(self, messages, do_preprocess, adapter_name, tools=None, '
            'chat_template_kwargs=None, media_io_kwargs=None, mm_processor_kwargs=None, **kwargs)'
        },
    ),
    Patch(
        tokenize_texts_in_threads,
        f'{_PROCESSOR}._get_text_prompt_input',
        '(self, prompt, do_preprocess, adapter_name, tools=None, reasoning_effort=None, chat_template_kwargs=None, '
        '**kwargs)',
        why='LMDeploy tokenizes in the event loop: a long text holds up every other request, and the health check.',
        until='LMDeploy tokenizes in a thread.',
        process='server',
    ),
    Patch(
        encode_texts_in_threads,
        'lmdeploy.serve.openai.endpoints.auxiliary:register',
        '(router, server_context)',
        why='LMDeploy tokenizes the texts of /v1/encode in the event loop, as many and as long as they come.',
        until='LMDeploy tokenizes in a thread.',
        process='server',
    ),
    *(
        Patch(
            check_whole_bodies,
            f'{module}:validate_json_request',
            why='LMDeploy drops the keys of a request that it does not know, images among them, and what '
            "Anthropic's API has beside texts and the commonest images.",
            until='LMDeploy refuses keys and blocks that it does not read, and has cache_salt.',
            process='server',
            trigger=Trigger.MODEL,
        )
        for module in _BY_NAME
    ),
    *(
        Patch(
            tell_ids_from_texts,
            f'{target}:check_request',
            signature,
            why='LMDeploy puts input_ids with image_data into a chat message, where a list that a client wrote for a '
            'text would stand too, and applies the chat template to it.',
            until='LMDeploy hands input_ids with image_data on as /generate does.',
            process='server',
            trigger=Trigger.MODEL,
        )
        for target, signature in (
            ('lmdeploy.serve.openai.chat_completions.serving', '(request, server_context, json_request=None)'),
            (f'{_ANTHROPIC}.endpoints.messages', '(request, raw_request, server_context)'),
        )
    ),
    Patch(
        read_whole_input_items,
        f'{_RESPONSES}.protocol:ResponsesRequest',
        why="LMDeploy checks input items against OpenAI's types, which drop the keys of an image that they do not "
        'know, and names dozens of classes in its error messages.',
        until='LMDeploy keeps input items as they were sent.',
        process='server',
        trigger=Trigger.MODEL,
    ),
    Patch(
        read_images_of_responses,
        f'{_RESPONSES}.request:_text_from_content',
        '(content, field_name)',
        why='LMDeploy reads only texts of /v1/responses.',
        until='LMDeploy reads images of /v1/responses.',
        process='server',
        trigger=Trigger.MODEL,
    ),
    Patch(
        count_what_is_billed,
        f'{_ANTHROPIC}.endpoints.messages_count_tokens:register',
        '(router, server_context, *, merge_inline_system=False)',
        why='LMDeploy counts the base64 of an image as text, a hundred times too much, and does not count tools.',
        until="LMDeploy counts visual tokens with the model's own preprocessing.",
        process='server',
        uses={f'{_ANTHROPIC}.endpoints.validation:_validate_headers': '(raw_request)'},
    ),
    *(
        Patch(
            shorten_error_messages,
            f'lmdeploy.serve.{target}',
            signature,
            why=_LONG,
            until=_SHORT,
            process='server',
        )
        for target, signature in (
            ('openai.errors:create_error_response', '(status, message, error_type=None, error_code=None, param=None)'),
            ('anthropic.errors:create_error_response', "(status, message, error_type='invalid_request_error')"),
            ('openai.responses.request:error_response', '(status, message, *, param=None, error_code=None)'),
        )
    ),
    *(
        Patch(
            shorten_errors_of_requests,
            f'lmdeploy.serve.{target}',
            signature,
            why=_LONG,
            until=_SHORT,
            process='server',
        )
        for target, signature in (
            ('openai.errors:request_error_payload', '(error, *, param=None)'),
            ('anthropic.errors:anthropic_error_from_request', '(error)'),
        )
    ),
    Patch(
        name_no_classes,
        'lmdeploy.serve.openai.api_server:validation_exception_handler',
        '(request, exc)',
        why="pydantic names the server's classes and types in the place of an error.",
        until='LMDeploy names only what the client sent.',
        process='server',
        trigger=Trigger.MODEL,
    ),
)
