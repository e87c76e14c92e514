"""Post-import hooks of the adapter: every change to LMDeploy, each with its reason and the condition for its removal.

None of these hooks changes what LMDeploy does for a model that is not a ViCO checkpoint.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

logger = logging.getLogger(__name__)

_LOADER = 'config_from_pretrained'


def load_configs_without_remote_code(module: ModuleType) -> None:
    """Give ViCO checkpoints our config class.

    Why: published checkpoints point at remote code, which LMDeploy would need ``--trust-remote-code`` to run.
    Registering the class with transformers instead would also take over plain InternVL checkpoints. Can go when
    transformers or LMDeploy ship a config for ``internvl_chat``.
    """
    if _is_wrapped(getattr(module, _LOADER)):
        return

    def load(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        del instance
        from lmdeploy_vico.adapter.hf_config import load_vico_config

        return load_vico_config(*args, **kwargs) or wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, _LOADER, load)


def choose_pytorch_engine(module: ModuleType) -> None:
    """Have ``autoget_backend`` choose the PyTorch engine for ViCO checkpoints.

    Why: TurboMind's own InternVL vision model knows nothing of the router and would serve 256 tokens a tile without a
    word. Can go when TurboMind refuses or routes ViCO checkpoints.
    """
    if _is_wrapped(module.is_supported):
        return

    def is_supported(wrapped: Callable[..., bool], instance: Any, args: Any, kwargs: Any) -> bool:
        del instance
        from lmdeploy.archs import get_model_arch

        from lmdeploy_vico.adapter.hf_config import VicoChatConfig

        if not wrapped(*args, **kwargs):
            return False
        model_path, trust_remote_code = _is_supported_arguments(*args, **kwargs)
        if os.path.exists(os.path.join(model_path, 'triton_models')):
            return True  # converted for TurboMind: there is no config to read
        if isinstance(get_model_arch(model_path, trust_remote_code=trust_remote_code)[1], VicoChatConfig):
            logger.info('%s is a ViCO checkpoint: using the PyTorch engine, TurboMind has no router', model_path)
            return False
        return True

    wrapt.wrap_function_wrapper(module, 'is_supported', is_supported)


def register_vision_model(module: ModuleType) -> None:
    """Put our VisionModel before LMDeploy's, where the first that matches a config is taken.

    Can go when LMDeploy lets a plugin register a vision model with priority.
    """
    from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel

    models = module.VISION_MODELS.module_dict
    others = {name: model for name, model in models.items() if model is not VicoVisionModel}
    models.clear()
    models[VicoVisionModel.__name__] = VicoVisionModel
    models.update(others)


def start_vision_model(module: ModuleType) -> None:
    """Start our VisionModel with the engine's config, and let requests be prepared side by side.

    Why: LMDeploy gives the VisionModel neither ``block_size`` nor ``--hf-overrides``, and prepares one request at a
    time in a single thread. Can go when LMDeploy passes its config on and awaits an asynchronous ``preprocess``.
    """
    encoder_class = module.ImageEncoder
    if _is_wrapped(encoder_class.__init__):
        return

    def init(wrapped: Callable[..., None], instance: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel

        if isinstance(instance.model, VicoVisionModel):
            instance.model.start(_backend_config(*args, **kwargs))
            instance.preprocess = instance.model.preprocess_async

    wrapt.wrap_function_wrapper(encoder_class, '__init__', init)


def prepare_media(module: ModuleType) -> None:
    """The two hooks on what fetches and decodes a request's images and videos."""
    admit_before_decoding(module)
    decode_side_by_side(module)


def admit_before_decoding(module: ModuleType) -> None:
    """Have a request ask for a place in the vision stage before its images are fetched and decoded.

    Why: decoding is the first thing LMDeploy does, so a server with too much to do would decode what it then refuses;
    and it looks for a client that has gone only when it generates. Can go when LMDeploy asks its vision model before it
    decodes, and watches for disconnects meanwhile.
    """
    processor_class = module.MultimodalProcessor
    if _is_wrapped(processor_class._get_multimodal_prompt_input):
        return

    async def prompt_input(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel

        model = getattr(instance.vl_encoder, 'model', None)
        if not isinstance(model, VicoVisionModel):
            return await wrapped(*args, **kwargs)
        from lmdeploy_vico.adapter.server.disconnect import while_client_waits

        # LMDeploy names all arguments. What it hands on as "messages" from here is the parsed request.
        async with model.admit(*_admission_arguments(*args, **kwargs)) as request:
            arguments = {**kwargs, 'messages': request}
            return await while_client_waits(lambda: asyncio.ensure_future(wrapped(**arguments)))

    wrapt.wrap_function_wrapper(processor_class, '_get_multimodal_prompt_input', prompt_input)


def guard_vlm_engine(module: ModuleType) -> None:
    """Refuse token ids outside the vocabulary, and stop our threads when the engine is closed.

    Why: LMDeploy looks ids up unchecked, so one bad id of one client ends the engine for all; and it keeps its vision
    model when it closes. Can go when LMDeploy checks ``input_ids`` and closes its vision model.
    """
    engine_class = module.VLAsyncEngine
    if _is_wrapped(engine_class.close):
        return

    def vico_model(engine: Any) -> Any:
        from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel

        model = engine.vl_encoder.model if hasattr(engine, 'vl_encoder') else None
        return model if isinstance(model, VicoVisionModel) else None

    def preprocess(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        model, ids = vico_model(instance), kwargs.get('input_ids')
        if model is not None and ids is not None:
            try:
                model.check_ids(ids)
            except ValueError as error:
                from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

                if not isinstance(kwargs.get('session_id'), int):
                    instance.session_mgr.remove(kwargs['session_id'])
                raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from error
        return wrapped(*args, **kwargs)

    def close(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        model = vico_model(instance)
        if model is not None:
            model.close()
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(engine_class, 'preprocess', preprocess)
    wrapt.wrap_function_wrapper(engine_class, 'close', close)


def decode_side_by_side(module: ModuleType) -> None:
    """Decode the images and videos of a message in parallel, where our VisionModel serves.

    Why: LMDeploy decodes the items of one message one after the other in one thread, gives a video item no say in how
    it is decoded, and reports a URL that cannot be fetched as "Request preprocessing failed." Can go when LMDeploy
    decodes item by item.
    """
    processor_class = module.MultimodalProcessor
    if _is_wrapped(processor_class.__init__):
        return

    def init(wrapped: Callable[..., None], instance: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel

        model = getattr(instance.vl_encoder, 'model', None)
        if isinstance(model, VicoVisionModel):
            from lmdeploy_vico.adapter.server.media import MediaParser

            # Takes the place of a static method, for this processor only.
            instance.async_parse_multimodal_item = MediaParser(processor_class)

    wrapt.wrap_function_wrapper(processor_class, '__init__', init)


def say_when_to_retry(module: ModuleType) -> None:
    """Add ``Retry-After`` to the 503 of a request that came while too many tiles were waiting.

    Can go when LMDeploy's error responses carry a header that an error asks for.
    """
    if _is_wrapped(module.create_request_error_response):
        return

    def respond(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        del instance
        response = wrapped(*args, **kwargs)
        error = kwargs['error'] if 'error' in kwargs else args[0]
        if hasattr(error, 'retry_after'):
            response.headers['Retry-After'] = str(error.retry_after)
        return response

    wrapt.wrap_function_wrapper(module, 'create_request_error_response', respond)


def notice_clients_that_leave(module: ModuleType) -> None:
    """Let the server of a ViCO model cancel the vision work of requests whose client has gone.

    Why: LMDeploy looks for a disconnect only between tokens of an answer, so the images of an abandoned request would
    be encoded, and hold up those of others. Can go when LMDeploy cancels ``preprocess`` on a disconnect. Attached to
    ``mount_metrics``, which every server calls with its application, after its model has been started.
    """
    if _is_wrapped(module.mount_metrics):
        return

    def mount(wrapped: Callable[..., None], instance: Any, args: Any, kwargs: Any) -> None:
        del instance
        from lmdeploy_vico.adapter.server.disconnect import DisconnectMiddleware, watching_clients

        wrapped(*args, **kwargs)
        if watching_clients():
            app = kwargs['app'] if 'app' in kwargs else args[0]
            app.add_middleware(DisconnectMiddleware)

    wrapt.wrap_function_wrapper(module, 'mount_metrics', mount)


def register_chat_models(module: ModuleType) -> None:
    """Name our engine-side classes in the map that LMDeploy keeps for custom models.

    Can go when LMDeploy offers an entry point for out-of-tree models.
    """
    from lmdeploy_vico.adapter.engine.architectures import add_chat_models

    add_chat_models(module.MODULE_MAP, module.CUSTOM_MODULE_MAP)


def register_model_config(module: ModuleType) -> None:
    """Put our model config builder before LMDeploy's, where the first that matches a config is taken.

    Can go when LMDeploy lets a plugin register a builder with priority.
    """
    from lmdeploy_vico.adapter.engine.model_config import VicoModelConfigBuilder

    builders = module.AutoModelConfigBuilder._sub_classes
    builders.remove(VicoModelConfigBuilder)  # it entered itself at the end when it was defined
    builders.insert(0, VicoModelConfigBuilder)


def make_up_dummy_weights(module: ModuleType) -> None:
    """Have a ViCO language model make its weights up where the option ``dummy_weights`` is set.

    Why: LMDeploy's loader looks for weight files before it asks the model, and its ``empty_init`` leaves the parameters
    uninitialised and the engine asleep. Can go when LMDeploy has a dummy load format.
    """
    if _is_wrapped(module.load_model_weights):
        return

    def load(wrapped: Callable[..., None], instance: Any, args: Any, kwargs: Any) -> None:
        del instance
        model = kwargs['model'] if 'model' in kwargs else args[0]
        if not getattr(model, 'vico_dummy_weights', False):
            wrapped(*args, **kwargs)
            return
        model.fill_with_dummy_weights()
        module.process_weights_after_loading(model)

    wrapt.wrap_function_wrapper(module, 'load_model_weights', load)


def _is_wrapped(function: Callable[..., Any]) -> bool:
    return isinstance(function, (wrapt.FunctionWrapper, wrapt.BoundFunctionWrapper))


def _backend_config(
    model_path: str, backend: str, vision_config: Any = None, backend_config: Any = None, **kwargs: Any
) -> Any:
    return backend_config


def _admission_arguments(
    *, messages: Any, media_io_kwargs: Any = None, mm_processor_kwargs: Any = None, **kwargs: Any
) -> tuple[Any, Any, Any]:
    return messages, media_io_kwargs, mm_processor_kwargs


def _is_supported_arguments(model_path: str, trust_remote_code: bool = False) -> tuple[str, bool]:
    return model_path, trust_remote_code


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    'lmdeploy.hf_configs': load_configs_without_remote_code,
    # Holds the loader under a name of its own, which may have been bound before the hook above ran.
    'lmdeploy.pytorch.transformers': load_configs_without_remote_code,
    'lmdeploy.turbomind.supported_models': choose_pytorch_engine,
    'lmdeploy.vl.model.builder': register_vision_model,
    'lmdeploy.vl.engine': start_vision_model,
    'lmdeploy.serve.processors.multimodal': prepare_media,
    'lmdeploy.serve.core.vl_async_engine': guard_vlm_engine,
    'lmdeploy.serve.openai.errors': say_when_to_retry,
    'lmdeploy.serve.anthropic.errors': say_when_to_retry,
    'lmdeploy.serve.openai.api_server': notice_clients_that_leave,
    'lmdeploy.pytorch.models.module_map': register_chat_models,
    'lmdeploy.pytorch.configurations': register_model_config,
    'lmdeploy.pytorch.weight_loader.model_weight_loader': make_up_dummy_weights,
}
