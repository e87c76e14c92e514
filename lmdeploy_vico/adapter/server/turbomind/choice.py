"""Which engine runs the language model: the PyTorch engine, unless the environment asks for TurboMind."""

import logging
from typing import Any

from lmdeploy.messages import TurbomindEngineConfig

from lmdeploy_vico.adapter.server.placement.language import PytorchLanguage
from lmdeploy_vico.adapter.server.turbomind.checks import (
    OTHERWISE,
    VARIABLE,
    requested,
    require_architecture,
    require_quantisation,
)
from lmdeploy_vico.adapter.server.turbomind.language import TurbomindLanguage
from lmdeploy_vico.choices import TURBOMIND
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.options import OptionError, Options

logger = logging.getLogger(__name__)


def choose_turbomind(hf_config: Any, supported: bool) -> bool:
    """Return whether LMDeploy is to choose TurboMind for a ViCO checkpoint.

    Args:
        hf_config: the checkpoint's.
        supported: whether LMDeploy says that TurboMind can serve it.

    Raises:
        UnsupportedCheckpointError, OptionError: the environment asks for TurboMind, which cannot; the text says why.
    """
    if not requested():
        return False
    require_architecture(hf_config)
    require_quantisation(hf_config)
    if not supported:
        raise OptionError(f'{VARIABLE}={TURBOMIND} needs a CUDA device, and there is none: {OTHERWISE}')
    return True


def language_engine(hf_config: Any, config: Any) -> PytorchLanguage | TurbomindLanguage:
    """Return the language engine that LMDeploy has chosen, and log why.

    Args:
        hf_config: the checkpoint's, without ``--hf-overrides``.
        config: of the engine that LMDeploy is about to build.

    Raises:
        OptionError, UnsupportedCheckpointError, PatchError: it is not what the environment asks for, or cannot serve
            the checkpoint; the text says why.
    """
    options = Options.load(config.hf_overrides)
    if isinstance(config, TurbomindEngineConfig):
        if not requested():
            raise UnsupportedCheckpointError(
                f'A ViCO checkpoint is served on TurboMind only where {VARIABLE}={TURBOMIND} asks for it.'
            )
        logger.warning(
            'language model on TurboMind, as %s=%s says: EXPERIMENTAL, no GPU has run this combination yet',
            *(VARIABLE, TURBOMIND),
        )
        return TurbomindLanguage(hf_config, config, options)
    if requested():
        raise OptionError(f'{VARIABLE}={TURBOMIND} cannot be followed: {_why_not()}')
    logger.info('language model on the PyTorch engine, the default (%s)', VARIABLE)
    return PytorchLanguage(hf_config, config)


def _why_not() -> str:
    """Say why LMDeploy has chosen the PyTorch engine though TurboMind is asked for."""
    from lmdeploy import turbomind

    if not turbomind.is_available():
        return f'TurboMind cannot be loaded ({turbomind._import_error}). Install an LMDeploy with it, or {OTHERWISE}'
    return f'--backend pytorch, or a PytorchEngineConfig, asks for the other engine. Leave it out, or {OTHERWISE}'
