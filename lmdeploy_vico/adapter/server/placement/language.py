"""LMDeploy's PyTorch engine, as the language engine of a ViCO checkpoint: what the vision side asks about it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from lmdeploy.messages import PytorchEngineConfig

from lmdeploy_vico.adapter.handover import Span
from lmdeploy_vico.adapter.server.placement.kv_memory import report_kv_cache
from lmdeploy_vico.adapter.server.placement.parallel import require_parallelism
from lmdeploy_vico.adapter.server.placement.precision import engine_dtype
from lmdeploy_vico.adapter.server.placement.replicas import FreeMemory
from lmdeploy_vico.adapter.server.placement.weights import open_weights
from lmdeploy_vico.adapter.server.prompt import Ids, assemble
from lmdeploy_vico.checkpoints.files import Weights
from lmdeploy_vico.options import Options
from lmdeploy_vico.stage.jobs import EncodedImage


class LanguageEngine(Protocol):
    """What runs the language model."""

    @property
    def config(self) -> PytorchEngineConfig:
        """The engine's, in the terms of LMDeploy's PyTorch engine: its devices, and whether it serves."""

    @property
    def dtype(self) -> torch.dtype:
        """The data type in which the vision side makes visual tokens."""

    def require_ranks(self) -> None:
        """Raise OptionError if the model cannot be split as the operator asks."""

    def open_weights(self, model_path: str, options: Options) -> Weights:
        """Return the checkpoint's weights; those of the language model have been checked."""

    def report_memory(self, model_path: str, before: Mapping[torch.device, FreeMemory]) -> None:
        """Log what the vision side costs the language model; ``before`` is what was free without it."""

    def assemble(
        self, pieces: Sequence[Ids], images: Sequence[EncodedImage], image_token_id: int
    ) -> tuple[Ids, Sequence[Any]]:
        """Return a prompt's ids, and its visual tokens in the form in which LMDeploy hands them to this engine."""


class PytorchLanguage:
    """The PyTorch engine.

    Args:
        hf_config: the checkpoint's, without ``--hf-overrides``.
        config: the engine's.
    """

    def __init__(self, hf_config: Any, config: PytorchEngineConfig) -> None:
        self._hf_config, self._config = hf_config, config

    @property
    def config(self) -> PytorchEngineConfig:
        """The engine's."""
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """The engine's, by LMDeploy's own decision."""
        return engine_dtype(self._hf_config, self._config)

    def require_ranks(self) -> None:
        """Raise OptionError if the ranks do not divide the language model."""
        require_parallelism(self._hf_config.llm_config, self._config)

    def open_weights(self, model_path: str, options: Options) -> Weights:
        """Return the checkpoint's weights, or random ones; see :func:`weights.open_weights`."""
        return open_weights(model_path, self._hf_config, self._config, options)

    def report_memory(self, model_path: str, before: Mapping[torch.device, FreeMemory]) -> None:
        """Log an estimate of the KV cache."""
        report_kv_cache(model_path, self._hf_config, self._config, before)

    def assemble(
        self, pieces: Sequence[Ids], images: Sequence[EncodedImage], image_token_id: int
    ) -> tuple[Ids, list[Span]]:
        """Return a prompt's ids, and its visual tokens as spans that end where KV blocks end."""
        return assemble(pieces, images, image_token_id, self._config.block_size)
