"""TurboMind, as the language engine of a ViCO checkpoint: what the vision side asks about it, before and after."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig

from lmdeploy_vico.adapter.server.placement.replicas import FreeMemory
from lmdeploy_vico.adapter.server.placement.weights import as_served
from lmdeploy_vico.adapter.server.prompt import Ids, place
from lmdeploy_vico.adapter.server.turbomind import checks
from lmdeploy_vico.adapter.server.turbomind.inputs import VisualInput
from lmdeploy_vico.checkpoints.files import Checkpoint, NoWeightsError
from lmdeploy_vico.checkpoints.language_model import language_model_shapes
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.options import OptionError, Options
from lmdeploy_vico.patching import Trigger, register
from lmdeploy_vico.stage.jobs import EncodedImage

logger = logging.getLogger(__name__)

LACKS = (
    'prompts with images neither use nor fill the prefix cache',
    'there are no LoRA adapters (--adapters is ignored)',
    'there is no logit_bias, no repetition_ngram_size and no logprob_start_len; requests with one of them get a 400',
    'log probabilities of greedy answers, and a top_k between 1024 and the vocabulary, get a 400',
)


class TurbomindLanguage:
    """TurboMind.

    Args:
        hf_config: the checkpoint's, without ``--hf-overrides``.
        config: the engine's.
        options: the server's.

    Attributes:
        config: the same in the terms of the PyTorch engine.
        dtype: of visual tokens as the vision side makes them; :meth:`assemble` converts them.
        width: of the engine's embeddings.
        engine_dtype: what TurboMind will most likely compute in, and what it has chosen when it is built.

    Raises:
        OptionError, UnsupportedCheckpointError, PatchError: TurboMind cannot serve this; the text says why.
    """

    def __init__(self, hf_config: Any, config: TurbomindEngineConfig, options: Options) -> None:
        register.apply(Trigger.TURBOMIND)
        checks.require_dtype(config.dtype)
        checks.require_weights(options)
        self._hf_config = as_served(hf_config, config.hf_overrides)
        checks.require_architecture(self._hf_config)
        checks.require_quantisation(self._hf_config)
        self.config = PytorchEngineConfig(
            tp=checks.require_devices(config, options),
            hf_overrides=config.hf_overrides,
            distributed_executor_backend='mp',  # no Ray cluster decides where its ranks are
            enable_mp_engine=getattr(config, checks.SERVES, False),
        )
        self.engine_dtype = checks.likely_dtype(config.dtype, self._hf_config)
        self._beyond_float16 = checks.beyond_float16(config.dtype, self._hf_config)
        # The vision side would cut what float16 cannot hold off; here that is refused, when it is known.
        self.dtype = torch.float32 if self.engine_dtype == torch.float16 else torch.bfloat16
        self.width: int = self._hf_config.llm_config.hidden_size
        for lack in LACKS:
            logger.info('on TurboMind %s', lack)
        if config.enable_prefix_caching:
            logger.warning('--enable-prefix-caching helps prompts without images only on TurboMind')

    def require_ranks(self) -> None:
        """Do nothing: TurboMind pads what its ranks cannot share."""

    def open_weights(self, model_path: str, options: Options) -> Checkpoint:
        """Return the checkpoint's weights; raises UnsupportedCheckpointError where unquantised ones are missing."""
        del options
        try:
            checkpoint = Checkpoint(model_path)
        except NoWeightsError as error:
            raise UnsupportedCheckpointError(str(error)) from error
        checkpoint.require(language_model_shapes(self._hf_config.llm_config, self._hf_config), 'language model')
        return checkpoint

    def report_memory(self, model_path: str, before: Mapping[torch.device, FreeMemory]) -> None:
        """Say that there is no estimate: what TurboMind takes beside a vision side has not been measured."""
        del model_path, before
        logger.info('KV cache: no estimate for TurboMind')

    def assemble(
        self, pieces: Sequence[Ids], images: Sequence[EncodedImage], image_token_id: int
    ) -> tuple[Ids, list[VisualInput]]:
        """Return a prompt's ids, and its visual tokens as TurboMind takes them, in a list; empty without images.

        Raises:
            RequestError: the visual tokens do not fit the engine.
        """
        ids, starts = place(pieces, images, image_token_id)
        if not images:
            return ids, []
        visual = VisualInput.of(images, starts, self.engine_dtype, self._beyond_float16)
        visual.require(len(ids), self.width, self.engine_dtype)
        return ids, [visual]

    def building(self, config: TurbomindEngineConfig) -> TurbomindEngineConfig:
        """Return the config with which the engine is built: without the ViT in C++, which knows no router.

        Before it is built, LMDeploy must not see this: it would take the model for one without images.
        """
        alone = copy.copy(config)
        alone.language_model_only = True
        return alone

    def built(self, engine: Any) -> None:
        """Take the data type from TurboMind, which has been built, and compare the width.

        Raises:
            OptionError, UnsupportedCheckpointError: visual tokens would not fit; the text says what to do.
        """
        chosen = engine.engine_config.dtype
        if chosen not in checks.DTYPES:
            raise OptionError(f'TurboMind runs in {chosen}, in which it takes no visual tokens: set --dtype bfloat16.')
        self.engine_dtype = checks.DTYPES[chosen]
        width = engine.source_model.text_model.cfg.hidden_size
        if width != self.width:
            raise UnsupportedCheckpointError(
                f"The vision side makes visual tokens of {self.width} values, and TurboMind's language model takes "
                f'{width}: the two do not belong together.'
            )
        logger.info('TurboMind runs in %s; its embeddings have %d values', chosen, width)
