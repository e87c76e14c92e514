"""Decides whether LMDeploy's engine runs on the CPU reference backend, and says so once."""

import logging
import multiprocessing
from functools import cache

logger = logging.getLogger('lmdeploy_vico')

MESSAGE = 'no CUDA device: running on the CPU reference backend'
# LMDeploy's names for the processes it spawns for the engine and its tensor-parallel workers.
_ENGINE_PROCESSES = ('mp_engine_proc', 'ExecutorProc-')


@cache
def has_cuda() -> bool:
    """Whether PyTorch sees a CUDA device in this process."""
    import torch

    return torch.cuda.is_available()


def runs_on_cpu(device_type: str | None = 'cuda') -> bool:
    """Whether an engine asked for on ``device_type`` has to run on the CPU.

    ``cuda`` is LMDeploy's default; its other device types (``ascend``, ``maca``, ``camb``) are left alone.
    """
    return device_type in (None, 'cuda', 'auto') and not has_cuda()


@cache
def announce() -> None:
    """Log once, in the process of the user, that the CPU backend serves; LMDeploy's own child processes are silent."""
    if not multiprocessing.current_process().name.startswith(_ENGINE_PROCESSES):
        logger.warning(MESSAGE)
