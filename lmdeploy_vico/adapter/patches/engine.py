"""Changes to LMDeploy's engine process. None of them has an effect on a model that is not a ViCO checkpoint.

But two, which change nothing where LMDeploy's own code does not fail: ``spare_answers_without_stop_words`` and
``end_abandoned_streams_quietly``.
"""

import asyncio
from typing import Any

from lmdeploy_vico.patching import Call, Patch, Target

_LOADER = 'lmdeploy.pytorch.weight_loader.model_weight_loader'
_MODULE_MAP = 'lmdeploy.pytorch.models.module_map'
_MODELS = 'lmdeploy.pytorch.models.patch'
_BUILDER = 'lmdeploy.pytorch.configurations:AutoModelConfigBuilder'
_QUANTISATION = 'lmdeploy.pytorch.config:QuantizationConfig'


def name_chat_models(target: Target) -> None:
    """Name our engine-side classes in the map that LMDeploy keeps for custom models."""
    from lmdeploy_vico.adapter.engine.architectures import add_chat_models

    add_chat_models(target.owner.MODULE_MAP, target.value)


def put_model_config_first(target: Target) -> None:
    """Put our model config builder before LMDeploy's, where the first that matches a config is taken."""
    from lmdeploy_vico.adapter.engine.model_config import VicoModelConfigBuilder

    builders = target.value
    builders.remove(VicoModelConfigBuilder)  # it entered itself at the end when it was defined
    builders.insert(0, VicoModelConfigBuilder)


def make_up_dummy_weights(call: Call) -> None:
    """Have a ViCO language model make its weights up where the option ``dummy_weights`` is set."""
    model = call['model']
    if not getattr(model, 'vico_dummy_weights', False):
        call.proceed()
        return
    from lmdeploy.pytorch.weight_loader.model_weight_loader import process_weights_after_loading

    model.fill_with_dummy_weights()
    process_weights_after_loading(model)


def fail_alone(call: Call) -> None:
    """Have a request fail alone that the engine cannot take."""
    from lmdeploy_vico.adapter.engine.intake import add_each, serves_vico

    if serves_vico(call.instance):
        add_each(call.instance, call['reqs'], lambda requests: call.proceed(reqs=requests))
    else:
        call.proceed()


def spare_answers_without_stop_words(call: Call) -> Any:
    """Look for repetitions in a batch in which some answers have no stop words."""
    stop_words = call['stop_words']
    # Lists are filled up with -1, which is no index. Nothing is changed where no repetition was found.
    return call.proceed(stop_words=stop_words if stop_words is None else stop_words.clamp(min=0))


def end_abandoned_streams_quietly(call: Call) -> None:
    """Let what makes an answer end as cancelled if it has something more to say after its client has left."""
    if call.instance.done:
        raise asyncio.CancelledError
    call.proceed()


PATCHES = (
    Patch(
        name_chat_models,
        f'{_MODULE_MAP}:CUSTOM_MODULE_MAP',
        why='LMDeploy finds the class of a language model by its name, in maps of its own.',
        until='LMDeploy offers an entry point for out-of-tree models.',
        process='engine',
        uses={
            f'{_MODULE_MAP}:MODULE_MAP': None,
            f'{_MODELS}:_get_module_map': '()',
            f'{_MODELS}:_class_from_qualname': '(qualname)',
            'lmdeploy.pytorch.adapter.adapter:load_lora_weights': '(model, weights, adapter_id)',
            f'{_QUANTISATION}.from_config': '(cls, hf_config)',
            f'{_QUANTISATION}.get_quant_method': "(self, prefix='', module_kind='linear')",
        },
    ),
    Patch(
        put_model_config_first,
        f'{_BUILDER}._sub_classes',
        why="LMDeploy's InternVL config builder matches ViCO checkpoints too.",
        until='LMDeploy lets a plugin register a builder with priority.',
        process='server and engine',
        uses={f'{_BUILDER}.build': '(cls, hf_config, model_path=None, **kwargs)'},
    ),
    Patch(
        make_up_dummy_weights,
        f'{_LOADER}:load_model_weights',
        '(model, checkpoint_path, prefix=None, device=None)',
        why='LMDeploy looks for weight files before it asks the model, and its empty_init leaves the parameters '
        'uninitialised and the engine asleep.',
        until='LMDeploy has a dummy load format.',
        process='engine',
        uses={f'{_LOADER}:process_weights_after_loading': '(model)'},
    ),
    Patch(
        fail_alone,
        'lmdeploy.pytorch.engine.engine:Engine._on_add_message',
        '(self, reqs, **kwargs)',
        why='An exception while a request is added ends the loop that serves all of them.',
        until='LMDeploy answers such a request with an error.',
        process='engine',
        uses={
            'lmdeploy.pytorch.engine.engine:Engine.end_session': '(self, session_id)',
            'lmdeploy.pytorch.engine.engine:Engine._response': "(self, resp, resp_type, data=None, err_msg='')",
        },
    ),
    Patch(
        spare_answers_without_stop_words,
        'lmdeploy.pytorch.engine.logits_process:_filter_repetition_ngram_',
        '(scores, stop_words, generated_ids, n, threshold, max_n, max_ngram_window_size)',
        why='repetition_ngram_size of one request indexes the vocabulary with -1 if another one in the batch ignores '
        'its end token, and the engine ends for all.',
        until='LMDeploy masks the stop words that it fills up.',
        process='engine',
    ),
    Patch(
        end_abandoned_streams_quietly,
        'lmdeploy.pytorch.engine.mp_engine.base_worker:StreamMailbox.publish',
        '(self, output)',
        why='LMDeploy logs a traceback for a client that leaves while its next token is on the way.',
        until='LMDeploy ends such a stream without an error.',
        process='engine',
    ),
)
