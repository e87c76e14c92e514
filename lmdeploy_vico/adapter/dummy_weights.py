"""Serving without weights, to size a deployment: which weights a start uses, and what cannot be made up."""

from typing import Any

from lmdeploy_vico.adapter.language_model import is_quantised, language_model_shapes
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.log import get_logger
from lmdeploy_vico.options import PREFIX, Options
from lmdeploy_vico.vision.weights import Checkpoint, DummyWeights, NoWeightsError, Weights

SWITCH = f'{PREFIX}DUMMY_WEIGHTS=1'


def open_weights(model_path: str, hf_config: Any, backend_config: Any, options: Options) -> Weights:
    """The checkpoint's weights, complete for both sides; or made-up ones, if the option says so.

    Raises:
        UnsupportedCheckpointError: tensors are missing or misshapen, or are quantised and cannot be made up.
    """
    if not options.dummy_weights:
        return _open_checkpoint(model_path, hf_config)
    if backend_config.model_format or is_quantised(hf_config.llm_config, hf_config):
        raise UnsupportedCheckpointError('dummy_weights cannot make up quantised weights: serve without quantisation.')
    get_logger().warning(
        'DUMMY WEIGHTS: all weights are made up, none of %s is read. The answers are random; for sizing only.',
        model_path,
    )
    return DummyWeights()


def _open_checkpoint(model_path: str, hf_config: Any) -> Checkpoint:
    try:
        checkpoint = Checkpoint(model_path)
    except NoWeightsError as error:
        raise UnsupportedCheckpointError(f'{error} To size a deployment without weights, set {SWITCH}.') from error
    checkpoint.require(language_model_shapes(hf_config.llm_config, hf_config))
    return checkpoint
