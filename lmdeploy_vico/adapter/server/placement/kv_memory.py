"""How much KV cache the vision side costs the language model: an estimate at start, by LMDeploy's own formulas.

LMDeploy gives all ranks the KV cache that fits on the device with the least free memory
(``ExecutorBase._get_min_num_gpu_blocks``). So a vision side on the device of one rank costs every rank its memory, and
one on each device costs no more. The estimate takes the weights' sizes from the checkpoint. What a rank needs besides
is a guess: no GPU has confirmed it yet.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from lmdeploy.messages import PytorchEngineConfig
from lmdeploy.utils import get_max_batch_size

from lmdeploy_vico.adapter.server.placement.devices import UnknownDevicesError, engine_devices, parallelism
from lmdeploy_vico.adapter.server.placement.replicas import FreeMemory, free_memory
from lmdeploy_vico.checkpoints.files import Checkpoint, NoWeightsError
from lmdeploy_vico.checkpoints.language_model import is_quantised, language_model_shapes
from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL
from lmdeploy_vico.checkpoints.rank_memory import CUDA_CONTEXT, CacheSizing, rank_bytes
from lmdeploy_vico.host_memory import GIB

logger = logging.getLogger(__name__)

WARN_FROM = 0.25  # share of the KV cache that a vision side may cost without a warning


@dataclass(frozen=True)
class Placement:
    """Free memory of that device of the engine which has the least, in bytes.

    Attributes:
        here: with the vision side where it is.
        elsewhere: if the vision side were on other devices.
    """

    here: int
    elsewhere: int


def report_kv_cache(
    model_path: str,
    hf_config: Any,
    engine: PytorchEngineConfig,
    before: Mapping[torch.device, FreeMemory],
) -> None:
    """Log the KV cache of a rank with the vision side where it is, and if it were elsewhere.

    A warning is logged where the difference is large. Nothing is raised: where no estimate is possible the log says
    why.

    Args:
        model_path: of the checkpoint.
        hf_config: of the checkpoint.
        engine: LMDeploy's config.
        before: free memory of the vision side's devices before it was loaded.
    """
    try:
        devices = engine_devices(engine)
        if devices[0].type == 'cpu':
            return
        if engine.num_gpu_blocks:
            logger.info('KV cache: %d blocks a rank, as --num-gpu-blocks says', engine.num_gpu_blocks)
            return
        sizing = cache_sizing(model_path, hf_config, engine)
        place = placement(devices, before)
        here, elsewhere = sizing.kv_bytes(place.here), sizing.kv_bytes(place.elsewhere)
    except UnknownDevicesError as error:
        logger.info('KV cache: no estimate, since %s', error)
    except Exception as error:
        logger.info('KV cache: no estimate (%s: %s)', type(error).__name__, error)
    else:
        _log(here, elsewhere, shared=any(device in before for device in devices), engine=engine)


def _log(here: int, elsewhere: int, shared: bool, engine: PytorchEngineConfig) -> None:
    if not shared:
        logger.info('KV cache: about %.1f GiB a rank (estimate); the vision side is on other devices', here / GIB)
        return
    logger.info(
        'KV cache: about %.1f GiB a rank, %.1f GiB if the vision side were on other devices (estimates)',
        *(here / GIB, elsewhere / GIB),
    )
    if not elsewhere:
        logger.warning('the language model leaves no memory for a KV cache: serve it on more devices (--tp).')
    elif here < elsewhere * (1 - WARN_FROM):
        logger.warning(
            'the place of the vision side costs about %.0f %% of the KV cache, and on every rank, since LMDeploy sizes '
            'them all by the poorest. Set vision_device to devices that the language model does not use, serve it on '
            'more devices (--tp), or give the KV cache a larger share of the free memory '
            '(--cache-max-entry-count, %g now).',
            *(100 * (1 - here / elsewhere), engine.cache_max_entry_count),
        )


def placement(devices: Sequence[torch.device], before: Mapping[torch.device, FreeMemory]) -> Placement:
    """Return the free memory of that one of the engine's ``devices`` which has the least.

    A device without a vision side is assumed to be empty. Asking it would create a CUDA context on it, which would take
    memory from its KV cache.

    Args:
        devices: of the engine.
        before: as for :func:`report_kv_cache`.
    """
    here, elsewhere = [], []
    for device in devices:
        if device in before:
            here.append(free_memory(device).free)
            elsewhere.append(before[device].free + CUDA_CONTEXT)
        else:
            empty = torch.cuda.get_device_properties(device).total_memory
            here.append(empty)
            elsewhere.append(empty)
    return Placement(min(here), min(elsewhere))


def cache_sizing(model_path: str, hf_config: Any, engine: PytorchEngineConfig) -> CacheSizing:
    """Return the numbers from which LMDeploy will compute the KV cache.

    Raises:
        ValueError: the size of the weights is not known.
    """
    if engine.model_format:
        raise ValueError(f'what the weights take as {engine.model_format} is not known')
    llm, dist = hf_config.llm_config, parallelism(engine)
    shapes = {} if is_quantised(llm, hf_config) else language_model_shapes(llm, hf_config)
    # LMDeploy serves a float32 checkpoint in 16 bits too. Quantised and unknown language models are served as stored.
    sizes = {name: 2 * prod(shape) for name, shape in shapes.items()} or stored_sizes(model_path)
    head_dim = getattr(llm, 'head_dim', None) or llm.hidden_size // llm.num_attention_heads
    kv_heads = max(llm.num_key_value_heads // dist.attn_tp, 1)
    return CacheSizing(
        weights=rank_bytes(sizes, dist, llm.num_key_value_heads),
        vocab_size=llm.vocab_size,
        max_batches=engine.max_batch_size or get_max_batch_size(engine.device_type),
        max_prefill_tokens=engine.max_prefill_token_num,
        share=engine.cache_max_entry_count,
        block=2 * 2 * llm.num_hidden_layers * kv_heads * head_dim * engine.block_size,
    )


def stored_sizes(model_path: str) -> dict[str, int]:
    """Return the bytes of each tensor of the language model, as the checkpoint stores them.

    Raises:
        ValueError: the checkpoint holds none, or a file is damaged.
    """
    try:
        sizes = Checkpoint(model_path).sizes
    except NoWeightsError:
        sizes = {}
    language_model = {name: size for name, size in sizes.items() if name.startswith(LANGUAGE_MODEL)}
    if not language_model:
        raise ValueError('the size of the weights is not known')
    return language_model
