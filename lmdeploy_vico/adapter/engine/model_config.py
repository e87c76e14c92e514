"""LMDeploy's model config of a ViCO checkpoint."""

from typing import Any

from lmdeploy.pytorch.configurations.builder import AutoModelConfigBuilder

from lmdeploy_vico.adapter.engine.architectures import vico_architecture
from lmdeploy_vico.adapter.hf_config import VicoChatConfig
from lmdeploy_vico.options import ENVIRONMENT_ONLY, OVERRIDES_KEY, environment_options
from lmdeploy_vico.patching import register


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
        """Build LMDeploy's ModelConfig; raises PatchError if LMDeploy could not be changed as needed."""
        register.require_all()
        config = AutoModelConfigBuilder.build(hf_config.llm_config, model_path, **kwargs)
        hf_config.architectures = [vico_architecture(hf_config.llm_config.architectures[0])]
        # Worker processes of an existing Ray cluster have an environment of their own. What --hf-overrides says is put
        # on top of it by LMDeploy, after this.
        options = {name: value for name, value in environment_options().items() if name not in ENVIRONMENT_ONLY}
        hf_config.update({OVERRIDES_KEY: options})
        config.hf_config = hf_config
        return config
