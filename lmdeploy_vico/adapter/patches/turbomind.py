"""Changes with which TurboMind runs the language model of a ViCO checkpoint, where the environment asks for it.

None of them has an effect on another model, nor where ``LMDEPLOY_VICO_LANGUAGE_ENGINE`` is not set to ``turbomind``.
But for the choice, which keeps ViCO checkpoints on the PyTorch engine then.
"""

import os
from typing import Any

from lmdeploy_vico.adapter.patches.server import vico_model
from lmdeploy_vico.patching import Call, Patch, Trigger

_INSTANCE = 'lmdeploy.turbomind.turbomind:TurboMindInstance'


def choose_language_engine(call: Call) -> bool:
    """Have ``autoget_backend`` choose the PyTorch engine for ViCO checkpoints, or TurboMind where that is asked for."""
    from lmdeploy.archs import get_model_arch

    from lmdeploy_vico.adapter.hf_config import VicoChatConfig
    from lmdeploy_vico.adapter.server.turbomind.checks import requested

    supported, path = bool(call.proceed()), call['model_path']
    # A model converted for TurboMind has no config to read.
    if not (supported or requested()) or os.path.exists(os.path.join(path, 'triton_models')):
        return supported
    config = get_model_arch(path, trust_remote_code=call['trust_remote_code'])[1]
    if not isinstance(config, VicoChatConfig):
        return supported
    from lmdeploy_vico.adapter.server.turbomind.choice import choose_turbomind

    return choose_turbomind(config, supported)


def note_that_a_server_starts(call: Call) -> Any:
    """Note in TurboMind's config that it is a server's."""
    from lmdeploy.messages import TurbomindEngineConfig

    from lmdeploy_vico.adapter.server.turbomind.checks import SERVES, requested

    config = call['backend_config']
    if isinstance(config, TurbomindEngineConfig) and requested():
        setattr(config, SERVES, True)
    return call.proceed()


def refuse_other_data_types(call: Call) -> Any:
    """Say which data types TurboMind has."""
    from lmdeploy.messages import TurbomindEngineConfig

    from lmdeploy_vico.adapter.hf_config import VicoChatConfig
    from lmdeploy_vico.adapter.server.turbomind.checks import require_dtype

    config = call['backend_config']
    if isinstance(call['hf_config'], VicoChatConfig) and isinstance(config, TurbomindEngineConfig):
        require_dtype(config.dtype)
    return call.proceed()


def build_without_vision(call: Call) -> Any:
    """Build TurboMind without the ViT in C++, and compare what it has become with the vision side."""
    model = vico_model(call.instance)
    if model is None:
        return call.proceed()
    engine = call.proceed(backend_config=model.language.building(call['backend_config']))
    model.language.built(engine)
    return engine


def take_visual_tokens(call: Call) -> Any:
    """Hand visual tokens to TurboMind as embeddings, and keep none of them for the time of the answer."""
    from lmdeploy_vico.adapter.server.turbomind.inputs import VisualInput

    visual = call['multimodal']
    if not visual or not isinstance(visual[0], VisualInput):  # a text, or another model's pictures
        return call.proceed()
    [only] = visual
    return call.proceed(multimodal=None, input_embeddings=only, input_embedding_ranges=only.ranges)


def take_embeddings_as_they_are(call: Call) -> Any:
    """Take visual tokens that are one tensor of the engine's data type already."""
    from lmdeploy_vico.adapter.server.turbomind.inputs import VisualInput

    visual = call['input_embeddings']
    return (visual.values, visual.ranges) if isinstance(visual, VisualInput) else call.proceed()


def take_compiled_grammar(call: Call) -> Any:
    """Take the grammar that was compiled in a thread, before the request was prepared."""
    from lmdeploy_vico.adapter.server.turbomind.grammar import Guide

    response_format = call['response_format']
    return response_format.grammar if isinstance(response_format, Guide) else call.proceed()


PATCHES = (
    Patch(
        choose_language_engine,
        'lmdeploy.turbomind.supported_models:is_supported',
        '(model_path, trust_remote_code=False)',
        why="TurboMind's own InternVL vision model knows no router: it would serve 256 tokens a tile without a word.",
        until='TurboMind refuses ViCO checkpoints, or routes their tiles.',
        process='server',
        uses={
            'lmdeploy.archs:get_model_arch': '(model_path, trust_remote_code=False)',
            'lmdeploy.turbomind.supported_models:SUPPORTED_ARCHS': None,
            'lmdeploy.turbomind:is_available': '()',
            'lmdeploy.turbomind:_import_error': None,
        },
    ),
    Patch(
        note_that_a_server_starts,
        'lmdeploy.serve.openai.api_server:get_task',
        '(backend, model_path, trust_remote_code=False, backend_config=None)',
        why="TurboMind's config does not say whether its clients are a server's, whose limits are other ones. Only "
        "LMDeploy's server calls this function by this name.",
        until='LMDeploy says so in its config.',
        process='server',
    ),
    Patch(
        refuse_other_data_types,
        'lmdeploy.vl.engine:_resolve_mm_feature_dtype',
        '(hf_config, backend_config)',
        why='LMDeploy ends with a KeyError at float32.',
        until='LMDeploy says which data types it accepts.',
        process='server',
    ),
    Patch(
        build_without_vision,
        'lmdeploy.serve.core.async_engine:AsyncEngine._build_turbomind',
        '(self, model_path, backend_config=None, trust_remote_code=False, **kwargs)',
        why="TurboMind would load LMDeploy's InternVL vision model, which takes memory and knows no router. "
        '--language-model-only would make LMDeploy drop images before.',
        until='TurboMind can be told to leave its vision model away.',
        process='server',
    ),
    Patch(
        take_visual_tokens,
        f'{_INSTANCE}.async_stream_infer',
        '(self, session_id, input_ids, input_embeddings=None, input_embedding_ranges=None, multimodal=None, '
        'gen_config=None, stream_output=False, **kwargs)',
        why='TurboMind takes embeddings in other arguments than those that LMDeploy passes, and LMDeploy would keep '
        'these for the time of the answer.',
        until='LMDeploy hands embeddings of new-style vision models to TurboMind.',
        process='server',
        trigger=Trigger.TURBOMIND,
        uses={
            'lmdeploy.turbomind.turbomind:TurboMind.mm_input_converter': '(self, multimodal)',
            'lmdeploy.turbomind.turbomind:update_parallel_config': '(cfg)',
        },
    ),
    Patch(
        take_embeddings_as_they_are,
        f'{_INSTANCE}.prepare_embeddings',
        '(self, input_embeddings=None, input_embedding_ranges=None)',
        why='LMDeploy copies all embeddings of a prompt on its event loop, and overflows in silence where it converts '
        'them to float16.',
        until='LMDeploy copies them in a thread, and checks them.',
        process='server',
        trigger=Trigger.TURBOMIND,
    ),
    Patch(
        take_compiled_grammar,
        'lmdeploy.turbomind.turbomind:compile_response_format',
        '(compiler, response_format)',
        why='LMDeploy compiles response formats on its event loop, for any time, and answers without them where that '
        'fails. It makes the compiler there too.',
        until='LMDeploy compiles response formats in a thread, and refuses those that it cannot compile.',
        process='server',
        trigger=Trigger.TURBOMIND,
        uses={
            'lmdeploy.turbomind.turbomind:TurboMind.grammar_compiler': None,
            'lmdeploy.turbomind.tokenizer_info:TokenizerInfo.from_huggingface': '(tokenizer, *, vocab_size=None, '
            'stop_token_ids=None)',
            'lmdeploy.turbomind:_tm': None,
            'lmdeploy._guided_decoding:ensure_response_format_compilable': '(response_format)',
        },
    ),
)
