"""Decides whether LMDeploy's engine runs on the CPU reference backend, and says so once."""

import logging
import multiprocessing
from functools import cache
from typing import Any

from lmdeploy_vico import log

logger = logging.getLogger(__name__)

MESSAGE = 'no CUDA device: running on the CPU reference backend'
# LMDeploy's names for the processes it spawns for the engine and its tensor-parallel workers.
_ENGINE_PROCESSES = ('mp_engine_proc', 'ExecutorProc-')


@cache
def has_cuda() -> bool:
    """Return whether PyTorch sees a CUDA device in this process."""
    import torch

    return torch.cuda.is_available()


def runs_on_cpu(device_type: str | None = 'cuda') -> bool:
    """Return whether an engine that is asked for on ``device_type`` has to run on the CPU.

    ``cuda`` is LMDeploy's default; its other device types (``ascend``, ``maca``, ``camb``) are left alone.
    """
    return device_type in (None, 'cuda', 'auto') and not has_cuda()


def check_supported(config: Any, speculative_config: Any = None) -> None:
    """Raise ValueError, in one sentence, if a ``PytorchEngineConfig`` asks for what the CPU backend does not have."""
    if config is None:
        return
    asked = {
        'a quantized KV cache: leave quant_policy at 0': config.quant_policy,
        'expert parallelism: leave ep at 1': config.ep > 1,
        'microbatches: leave enable_microbatch off': config.enable_microbatch,
        'a KV connector: leave kv_transfer_config unset': config.kv_transfer_config is not None,
        'speculative decoding: leave the draft model away': speculative_config is not None,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise ValueError(f'The CPU reference backend does not support {what}.')


@cache
def announce() -> None:
    """Log once, in the process of the user, that the CPU backend serves; LMDeploy's own child processes are silent."""
    if not multiprocessing.current_process().name.startswith(_ENGINE_PROCESSES):
        log.setup()  # which nothing else does where no ViCO model is served
        logger.warning(MESSAGE)
