"""The config classes that a checkpoint's ``auto_map`` names; this file is copied into every random checkpoint.

They take the place of the remote code of published checkpoints. LMDeploy's own InternVL classes need that code (with
``--trust-remote-code``); this plugin does not. Transformers imports the copy in the checkpoint, never this file.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    """The ``vision_config`` section."""

    model_type = 'intern_vit_6b'


class InternVLChatConfig(PretrainedConfig):
    """The whole ``config.json``."""

    model_type = 'internvl_chat'

    def __init__(
        self, vision_config: dict[str, Any] | None = None, llm_config: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        llm_config = dict(llm_config or {})
        self.llm_config = AutoConfig.for_model(llm_config.pop('model_type', 'qwen3'), **llm_config)
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The language model's section."""
        del args, kwargs
        return self.llm_config
