"""Open the weights that a server starts with, and check that both sides can be served from them.

With the option ``dummy_weights`` they are random and no file is read: for sizing a deployment.
"""

import logging
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from lmdeploy_vico.checkpoints.files import Checkpoint, NoWeightsError, Weights
from lmdeploy_vico.checkpoints.initialisation import DummyWeights
from lmdeploy_vico.checkpoints.language_model import is_quantised, language_model_shapes, quantised_shapes
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.options import PREFIX, Options

logger = logging.getLogger(__name__)

SWITCH = f'{PREFIX}DUMMY_WEIGHTS=1'


def open_weights(model_path: str, hf_config: Any, backend_config: Any, options: Options) -> Weights:
    """Return the checkpoint's weights, or random ones if ``dummy_weights`` is set.

    The language model's tensors have been checked then. The vision encoder checks its own when it loads them.

    Args:
        model_path: the checkpoint's directory.
        hf_config: the checkpoint's config; not changed.
        backend_config: LMDeploy's PytorchEngineConfig.
        options: the server's.

    Raises:
        UnsupportedCheckpointError: tensors are missing or misshapen, or LMDeploy cannot serve their quantisation, or
            random weights are asked for in place of quantised ones.
    """
    if not options.dummy_weights:
        return _open_checkpoint(model_path, as_served(hf_config, backend_config.hf_overrides))
    if backend_config.model_format or is_quantised(hf_config.llm_config, hf_config):
        raise UnsupportedCheckpointError('dummy_weights cannot make up quantised weights: serve without quantisation.')
    logger.warning(
        'DUMMY WEIGHTS: all weights are made up, none of %s is read. The answers are random; for sizing only.',
        model_path,
    )
    return DummyWeights()


def as_served(hf_config: Any, overrides: Mapping[str, Any] | None) -> Any:
    """Return a copy of the config as the engine sees it: with ``--hf-overrides`` applied."""
    # LMDeploy imports its vision models, and with them this module, before its engine.
    from lmdeploy.pytorch.config import override_hf_config

    config = deepcopy(hf_config)
    override_hf_config(config, overrides or {})
    return config


def _open_checkpoint(model_path: str, hf_config: Any) -> Checkpoint:
    try:
        checkpoint = Checkpoint(model_path)
    except NoWeightsError as error:
        raise UnsupportedCheckpointError(f'{error} To size a deployment without weights, set {SWITCH}.') from error
    language_model = hf_config.llm_config
    if is_quantised(language_model, hf_config):
        from lmdeploy_vico.adapter.engine.chat_model import vico_class
        from lmdeploy_vico.adapter.engine.quantisation import check_quantisation

        check_quantisation(hf_config, vico_class(language_model.architectures[0]).packed_modules_mapping)
    checkpoint.require(language_model_shapes(language_model, hf_config), 'language model')
    checkpoint.require_shapes(quantised_shapes(language_model, hf_config, checkpoint.dtypes))
    return checkpoint
