"""Whether TurboMind is asked for, and what of a checkpoint and of a command it can serve: before anything is loaded.

Imports nothing of the vision side: it is asked for every model that LMDeploy might serve on TurboMind.
"""

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from lmdeploy.messages import TurbomindEngineConfig
from lmdeploy.utils import is_bf16_supported

from lmdeploy_vico.choices import PYTORCH, TURBOMIND
from lmdeploy_vico.config import UnsupportedCheckpointError
from lmdeploy_vico.options import PREFIX, OptionError, Options

VARIABLE = f'{PREFIX}LANGUAGE_ENGINE'
SERVES = 'vico_serves'  # an attribute of TurboMind's config, which does not say itself whether it is a server's
DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}
# The methods of quantisation that TurboMind reads, and what it asks of each.
QUANTISED = {
    'awq': 'version "gemm", groups of 128',
    'gptq': 'symmetric, without desc_act, groups of 128',
    'fp8': 'blocks of 128 x 128',
    'mxfp4': 'groups of 32',
    'compressed-tensors': 'pack-quantized 4-bit integers, groups of 32 or 128',
}
OTHERWISE = f'set {VARIABLE}={PYTORCH}.'


def requested() -> bool:
    """Return whether the environment asks for TurboMind. ``--backend turbomind`` does not: it is the default."""
    return os.environ.get(VARIABLE) == TURBOMIND


def require_architecture(hf_config: Any) -> None:
    """Raise UnsupportedCheckpointError unless TurboMind has the language model's architecture."""
    from lmdeploy.turbomind.supported_models import SUPPORTED_ARCHS

    architecture = hf_config.llm_config.architectures[0]
    if architecture not in SUPPORTED_ARCHS:
        raise UnsupportedCheckpointError(f'TurboMind does not have the language model {architecture}: {OTHERWISE}')


def require_quantisation(hf_config: Any) -> None:
    """Raise UnsupportedCheckpointError unless TurboMind reads the language model's quantisation, if there is any."""
    quantisation = getattr(hf_config.llm_config, 'quantization_config', None)
    if quantisation and not _reads(quantisation):
        served = ', '.join(f'{name} ({how})' for name, how in QUANTISED.items())
        method = quantisation.get('quant_method')
        raise UnsupportedCheckpointError(
            f'TurboMind cannot serve this quantization_config ({method}). It reads {served}. Otherwise {OTHERWISE}'
        )


def _reads(quantisation: Mapping[str, Any]) -> bool:
    group, bits = quantisation.get('group_size') or 128, quantisation.get('bits') or 4
    match quantisation.get('quant_method'):
        case 'awq':
            return quantisation.get('version') == 'gemm' and (group, bits) == (128, 4)
        case 'gptq':
            symmetric = bool(quantisation.get('sym', True))
            return symmetric and not quantisation.get('desc_act', False) and (group, bits) == (128, 4)
        case 'fp8':
            return list(quantisation.get('weight_block_size') or ()) == [128, 128]
        case 'compressed-tensors':
            first = (quantisation.get('config_groups') or {}).get('group_0') or {}
            weights = first.get('weights') or {}
            integers = (weights.get('num_bits'), weights.get('type')) == (4, 'int')
            return first.get('format') == 'pack-quantized' and integers and weights.get('group_size') in (32, 128)
        case method:
            return method in QUANTISED


def require_dtype(requested: str) -> None:
    """Raise OptionError unless TurboMind can run in the data type that an engine's config asks for."""
    if requested not in ('auto', *DTYPES):
        raise OptionError(f'TurboMind runs in {" or ".join(DTYPES)}, not in {requested}: leave dtype at "auto".')


def likely_dtype(requested: str, hf_config: Any) -> torch.dtype:
    """Return the data type in which TurboMind will run most likely; it decides when it is built.

    Args:
        requested: ``--dtype``.
        hf_config: the checkpoint's.
    """
    wanted = _wanted_dtype(requested, hf_config)
    return torch.float16 if wanted == torch.bfloat16 and not is_bf16_supported() else wanted


def _wanted_dtype(requested: str, hf_config: Any) -> torch.dtype:
    """The data type in which TurboMind runs where the device can."""
    stored = str(getattr(hf_config.llm_config, 'dtype', None)).removeprefix('torch.')
    return DTYPES.get(requested if requested in DTYPES else stored, torch.bfloat16)


def beyond_float16(requested: str, hf_config: Any) -> str:
    """Return what an operator can do about visual tokens that float16 cannot hold, in which TurboMind runs.

    Args:
        requested: ``--dtype``.
        hf_config: the checkpoint's.
    """
    if _wanted_dtype(requested, hf_config) == torch.float16:
        return 'The server has to be started with --dtype bfloat16.'
    return f'Its device leaves it no other data type: the server has to be started with {VARIABLE}={PYTORCH}.'


def require_devices(config: TurbomindEngineConfig, options: Options) -> int:
    """Return how many devices of this machine the engine uses.

    Raises:
        OptionError: the ranks do not fit each other, or the devices are not the first ones and the vision side is not
            told where to go.
    """
    from lmdeploy.turbomind.turbomind import update_parallel_config

    derived = copy.deepcopy(config)  # it is written into
    try:
        update_parallel_config(derived)
    except AssertionError as error:
        raise OptionError(
            f'--tp {config.tp}, --dp {config.dp}, --cp {config.cp} and --ep {config.ep} do not work together on '
            f'{torch.cuda.device_count()} devices: {error}.'
        ) from error
    if list(derived.devices) != list(range(len(derived.devices))) and options.vision_device == 'auto':
        raise OptionError(
            f'TurboMind is told to use the devices {list(derived.devices)}: set vision_device to those that are to '
            f'encode images, for example {PREFIX}VISION_DEVICE=cuda:{derived.devices[0]}.'
        )
    return len(derived.devices)


def require_weights(options: Options) -> None:
    """Raise OptionError if weights are to be made up: TurboMind reads files."""
    if options.dummy_weights:
        raise OptionError(
            f'dummy_weights are not available on TurboMind, which reads all weights from files: {OTHERWISE} Or write '
            'random weights of a published size with "lmdeploy-vico tiny --like ... --weights".'
        )
