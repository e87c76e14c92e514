"""Changes to LMDeploy's API process. None of them has an effect on a model that is not a ViCO checkpoint."""

import asyncio
from typing import Any

from lmdeploy_vico.patching import Call, Patch, Target, Trigger

_PROCESSOR = 'lmdeploy.serve.processors.multimodal:MultimodalProcessor'
_ENGINE = 'lmdeploy.serve.core.vl_async_engine:VLAsyncEngine'


def load_configs_without_remote_code(call: Call) -> Any:
    """Give ViCO checkpoints our config class."""
    from lmdeploy_vico.adapter.hf_config import load_vico_config

    return load_vico_config(call['pretrained_model_name_or_path'], **call['kwargs']) or call.proceed()


def put_vision_model_first(target: Target) -> None:
    """Put our VisionModel before LMDeploy's, where the first that matches a config is taken."""
    from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel

    models = target.value
    others = {name: model for name, model in models.items() if model is not VicoVisionModel}
    models.clear()
    models[VicoVisionModel.__name__] = VicoVisionModel
    models.update(others)


def start_vision_model(call: Call) -> None:
    """Start our VisionModel with the engine's config, and prepare requests side by side."""
    from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel

    call.proceed()
    encoder = call.instance
    if isinstance(encoder.model, VicoVisionModel):
        encoder.model.start(call['backend_config'])
        encoder.preprocess = encoder.model.preprocess_async


def decode_side_by_side(call: Call) -> None:
    """Decode the images and videos of a message in parallel, where our VisionModel serves."""
    call.proceed()
    processor = call.instance
    model = vico_model(processor)
    if model is not None:
        from lmdeploy_vico.adapter.server.media import MediaParser

        # Takes the place of a static method, for this processor only.
        processor.async_parse_multimodal_item = MediaParser(model.loader, model.media_store)
        model.allowed_media_domains = call['allowed_media_domains']


async def admit_before_decoding(call: Call) -> Any:
    """Have a request ask for a place in the vision stage before its images are fetched and decoded."""
    model = vico_model(call.instance)
    if model is None:
        return await call.proceed()
    from lmdeploy_vico.adapter.server.disconnect import while_client_waits

    async with model.admit(call['messages']):
        return await while_client_waits(lambda: asyncio.ensure_future(call.proceed()))


def refuse_unknown_ids(call: Call) -> Any:
    """Refuse token ids outside the vocabulary, and options beside ids that are none."""
    model, ids = vico_model(call.instance), call['input_ids']
    if model is not None and ids is not None:
        try:
            model.parse(None, call['media_io_kwargs'], call['mm_processor_kwargs'])
            model.check_ids(ids)
        except ValueError as error:
            from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

            if not isinstance(call['session_id'], int):
                call.instance.session_mgr.remove(call['session_id'])
            raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from error
    return call.proceed()


def close_vision_model(call: Call) -> Any:
    """Stop the threads of our VisionModel when the engine is closed."""
    model = vico_model(call.instance)
    if model is not None:
        model.close()
    return call.proceed()


def say_when_to_retry(call: Call) -> Any:
    """Add ``Retry-After`` to the 503 of a request that came while too many tiles were waiting."""
    response = call.proceed()
    if hasattr(call['error'], 'retry_after'):
        response.headers['Retry-After'] = str(call['error'].retry_after)
    return response


def notice_clients_that_leave(call: Call) -> None:
    """Let the server of a ViCO model read bodies within bounds, and cancel the work for clients that have gone.

    It gets the page at ``/vico`` here, too, if that is asked for.

    Attached to a function that every server calls with its application, after its model has been started.
    """
    from lmdeploy_vico.adapter.server.disconnect import DisconnectMiddleware, watched_bounds
    from lmdeploy_vico.adapter.server.page.routes import add_page

    call.proceed()
    bounds = watched_bounds()
    if bounds is not None:
        call['app'].add_middleware(DisconnectMiddleware, bounds=bounds)
        add_page(call['app'])


def open_the_page(call: Call) -> Any:
    """Show the page at ``/vico`` to everybody, if the server has it; what the page asks needs a key as ever."""
    from lmdeploy_vico.adapter.server.page.routes import is_open

    return call.instance.app(call['scope'], call['receive'], call['send']) if is_open(call['scope']) else call.proceed()


def show_image_tokens(target: Target) -> None:
    """Add ``image_tokens`` and counts of tiles to the usage that LMDeploy reports, 0 for prompts without images.

    pydantic drops what a subclass adds, so the fields are added to LMDeploy's class and the classes that embed it are
    built again; their values are read from the request that is being served.
    """
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from lmdeploy_vico.adapter.server.usage import FIELDS

    details, protocol = target.value, target.owner
    for name, count in FIELDS.items():
        details.model_fields[name] = FieldInfo(annotation=int, default_factory=count)
    with_usage = [
        model
        for model in vars(protocol).values()
        if isinstance(model, type) and issubclass(model, BaseModel) and 'usage' in model.model_fields
    ]
    for model in (details, protocol.UsageInfo, *with_usage):
        model.model_rebuild(force=True)


def vico_model(owner: Any) -> Any:
    """The VisionModel of an engine or processor, if it is ours, else None."""
    from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel

    return VicoVisionModel.of(owner)


PATCHES = (
    # `pytorch.transformers` holds the loader under a name of its own, which may be bound before the other is patched.
    *(
        Patch(
            load_configs_without_remote_code,
            f'{module}:config_from_pretrained',
            '(pretrained_model_name_or_path, **kwargs)',
            why='Published checkpoints point at remote code, which LMDeploy runs only with --trust-remote-code. '
            'A class registered with transformers would also take over plain InternVL checkpoints.',
            until='transformers or LMDeploy have a config for internvl_chat.',
            process='server and engine',
        )
        for module in ('lmdeploy.hf_configs', 'lmdeploy.pytorch.transformers')
    ),
    Patch(
        put_vision_model_first,
        'lmdeploy.vl.model.builder:VISION_MODELS.module_dict',
        why="LMDeploy's InternVL vision model matches ViCO checkpoints too.",
        until='LMDeploy lets a plugin register a vision model with priority.',
        process='server',
    ),
    Patch(
        start_vision_model,
        'lmdeploy.vl.engine:ImageEncoder.__init__',
        '(self, model_path, backend, vision_config=None, backend_config=None, trust_remote_code=False)',
        why='LMDeploy gives the VisionModel neither block_size nor --hf-overrides, and prepares one request at a time '
        'in a single thread.',
        until='LMDeploy passes its config on and awaits an asynchronous preprocess.',
        process='server',
        # How LMDeploy decides about the engine, which the vision side has to know.
        uses={
            'lmdeploy.pytorch.config:override_hf_config': '(hf_config, hf_overrides)',
            'lmdeploy.pytorch.config:_update_torch_dtype': "(config, dtype, device_type='auto')",
            'lmdeploy.pytorch.config:DistConfig.from_engine_config': '(cls, engine_config)',
            'lmdeploy.pytorch.engine.executor:get_distributed_executor_backend': '(world_size, dp, device_type, '
            'logger=None)',
            'lmdeploy.utils:get_max_batch_size': '(device_type)',
        },
    ),
    Patch(
        decode_side_by_side,
        f'{_PROCESSOR}.__init__',
        '(self, tokenizer, chat_template, vl_encoder=None, backend=None, allowed_media_domains=None)',
        why='LMDeploy decodes whatever comes in threads of the server, for as long and into as much memory as it '
        'takes, reads every file of the machine that a client names, fetches without a limit, accepts half pictures, '
        'ignores how a video item asks to be decoded, and reports most errors as "Request preprocessing failed."',
        until='LMDeploy bounds time and memory of media, and decodes item by item.',
        process='server',
        uses={
            f'{_PROCESSOR}.async_parse_multimodal_item': '(messages, media_io_kwargs=None, allowed_media_domains=None)',
        },
    ),
    Patch(
        admit_before_decoding,
        f'{_PROCESSOR}._get_multimodal_prompt_input',
        '(self, messages, do_preprocess, adapter_name, tools=None, chat_template_kwargs=None, media_io_kwargs=None, '
        'mm_processor_kwargs=None, **kwargs)',
        why='LMDeploy decodes first, so a server with too much to do would decode what it then refuses; and it looks '
        'for a client that has gone only when it generates.',
        until='LMDeploy asks its vision model before it decodes, and watches for disconnects meanwhile.',
        process='server',
    ),
    Patch(
        refuse_unknown_ids,
        f'{_ENGINE}.preprocess',
        '(self, messages, session_id, gen_config=None, tools=None, reasoning_effort=None, do_preprocess=True, '
        'adapter_name=None, input_ids=None, enable_thinking=None, chat_template_kwargs=None, media_io_kwargs=None, '
        'mm_processor_kwargs=None, **kwargs)',
        why='LMDeploy looks ids up unchecked, so one bad id of one client ends the engine for all. Beside ids it never '
        'looks at media_io_kwargs and mm_processor_kwargs.',
        until='LMDeploy checks input_ids, and refuses options that it does not read.',
        process='server',
    ),
    Patch(
        close_vision_model,
        f'{_ENGINE}.close',
        '(self)',
        why='LMDeploy keeps its vision model, with its threads, when it closes.',
        until='LMDeploy closes its vision model.',
        process='server',
    ),
    *(
        Patch(
            say_when_to_retry,
            f'lmdeploy.serve.{module}:create_request_error_response',
            signature,
            why="LMDeploy's error responses have no headers of their own, so a client is not told when to try again.",
            until='LMDeploy sends the headers that an error asks for.',
            process='server',
        )
        for module, signature in (('openai.errors', '(error, *, param=None)'), ('anthropic.errors', '(error)'))
    ),
    Patch(
        notice_clients_that_leave,
        'lmdeploy.serve.openai.api_server:mount_metrics',
        '(app, backend_config)',
        why='LMDeploy looks for a disconnect only between tokens of an answer, so the images of an abandoned request '
        'would be encoded, and hold up those of others.',
        until='LMDeploy cancels preprocess on a disconnect, and bounds the bodies of requests.',
        process='server',
    ),
    Patch(
        open_the_page,
        'lmdeploy.serve.utils.server_utils:AuthenticationMiddleware.__call__',
        '(self, scope, receive, send)',
        why='A browser asks for a page without a key. It is public and holds no data.',
        until='LMDeploy has public routes beside those it knows.',
        process='server',
        trigger=Trigger.MODEL,
    ),
    Patch(
        show_image_tokens,
        'lmdeploy.serve.openai.protocol:PromptTokensDetails',
        why='LMDeploy reports the length of a prompt, which does not tell a client how far its images were compressed.',
        until='LMDeploy counts image tokens.',
        process='server',
        trigger=Trigger.MODEL,
        uses={'lmdeploy.serve.openai.protocol:UsageInfo': None},
    ),
)
