"""The Hugging Face config of a ViCO checkpoint, without the checkpoint's remote code."""

import logging
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lmdeploy_vico.config import UnsupportedCheckpointError, is_vico
from lmdeploy_vico.log import setup

_QUANTISATION = 'quantization_config'


class VicoChatConfig(PretrainedConfig):
    """``config.json`` of a ViCO checkpoint, with the language model's own config class inside.

    Lives at module level because LMDeploy pickles it to its worker processes.
    """

    model_type = 'internvl_chat'

    def __init__(
        self, vision_config: dict[str, Any] | None = None, llm_config: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        # Before super().__init__, which validates what get_text_config() returns.
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        quantisation = _quantisation(kwargs, llm_config or {})
        self.llm_config: Any = _language_model_config(llm_config or {})
        if quantisation:
            kwargs['quantization_config'] = quantisation
        # LMDeploy would look its model class up in the checkpoint's auto_map before it reads the architectures.
        kwargs.pop('auto_map', None)
        kwargs.setdefault('tie_word_embeddings', getattr(self.llm_config, 'tie_word_embeddings', False))
        super().__init__(**kwargs)

    @property
    def quantization_config(self) -> Any:
        """The language model's, wherever ``config.json`` has it; absent if nothing is quantised.

        LMDeploy looks here for the method, the data type and what is skipped, but its layers look in the language
        model's own config.
        """
        return self.llm_config.quantization_config

    @quantization_config.setter
    def quantization_config(self, value: Any) -> None:
        self.llm_config.quantization_config = value

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The language model's config, whatever part of the model is asked for."""
        del args, kwargs
        return self.llm_config

    def to_dict(self) -> dict[str, Any]:
        """As in ``config.json``, the sub-configs as dictionaries."""
        output = super().to_dict()
        output['vision_config'] = self.vision_config.to_dict()
        output['llm_config'] = self.llm_config.to_dict()
        return output


def _quantisation(config: dict[str, Any], llm_config: dict[str, Any]) -> Any:
    """Take the quantisation out of a checkpoint's config, or the language model's; null means none."""
    found = [one for one in (config.pop(_QUANTISATION, None), llm_config.get(_QUANTISATION)) if one]
    if len(found) == 2 and found[0] != found[1]:
        raise UnsupportedCheckpointError(
            'config.json has one quantization_config and another one in llm_config: remove the wrong one.'
        )
    return found[0] if found else None


def _language_model_config(config: dict[str, Any]) -> PretrainedConfig:
    config = {key: value for key, value in config.items() if key not in ('auto_map', _QUANTISATION)}
    model_type = config.pop('model_type', None)
    if model_type is None:
        return PretrainedConfig(**config)
    return AutoConfig.for_model(model_type, **config)


def load_vico_config(pretrained_model_name_or_path: str, **kwargs: Any) -> VicoChatConfig | None:
    """The config of a ViCO checkpoint, or None for any other model (which LMDeploy then loads as always)."""
    kwargs.pop('trust_remote_code', None)
    try:
        config, _ = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
    except Exception:  # LMDeploy reports a path that cannot be read in its own words
        return None
    if not is_vico(config):
        return None
    setup()
    _quiet_transformers()
    return VicoChatConfig.from_dict(config)


def _quiet_transformers() -> None:
    """Drop transformers' warning that ``internvl_chat`` is unknown to it, repeated at every tokenizer it loads."""
    logger = logging.getLogger('transformers.configuration_utils')
    if _about_unknown_type not in logger.filters:
        logger.addFilter(_about_unknown_type)


def _about_unknown_type(record: logging.LogRecord) -> bool:
    return f'a model of type `{VicoChatConfig.model_type}` to instantiate' not in record.getMessage()
