"""Changes to LMDeploy's engine process. None of them has an effect on a model that is not a ViCO checkpoint."""

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
)
