"""LMDeploy's model config of a ViCO checkpoint, and the names under which the engine finds our classes."""

from typing import Any

from lmdeploy.pytorch.configurations.builder import AutoModelConfigBuilder
from lmdeploy.pytorch.configurations.default import DefaultModelConfigBuilder

from lmdeploy_vico.adapter.hf_config import VicoChatConfig

ARCHITECTURE_PREFIX = 'Vico'
CHAT_MODEL_MODULE = 'lmdeploy_vico.adapter.chat_model'


class VicoModelConfigBuilder(AutoModelConfigBuilder):
    """The language model's config; the architecture is renamed for the engine alone.

    The API process keeps seeing InternVLChatModel, by which LMDeploy knows that the model takes images.
    """

    @classmethod
    def condition(cls, hf_config: Any) -> bool:
        """Only configs that our own loader made, which are those of ViCO checkpoints."""
        return isinstance(hf_config, VicoChatConfig)

    @classmethod
    def build(cls, hf_config: VicoChatConfig, model_path: str | None = None, **kwargs: Any) -> Any:
        """Build LMDeploy's ModelConfig."""
        config = DefaultModelConfigBuilder.build(hf_config.llm_config, model_path, **kwargs)
        hf_config.architectures = [f'{ARCHITECTURE_PREFIX}{hf_config.llm_config.architectures[0]}']
        config.hf_config = hf_config
        return config


def add_chat_models(module_map: dict[str, str], custom_module_map: dict[str, str]) -> None:
    """Enter ``VicoX`` for every architecture X of LMDeploy's; the classes are made when they are looked up."""
    for architecture in module_map:
        name = f'{ARCHITECTURE_PREFIX}{architecture}'
        custom_module_map[name] = f'{CHAT_MODEL_MODULE}.{name}'
