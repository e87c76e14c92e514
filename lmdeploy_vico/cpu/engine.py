"""Patches of LMDeploy's engine, applied when an engine starts in this process and never before.

:func:`install` is called from the entry points that :mod:`lmdeploy_vico.cpu.hooks` wraps. Everything here replaces
names inside LMDeploy's modules; ``torch`` itself is not touched. All of it can go when LMDeploy takes the device from
its backend instead of writing ``'cuda'``.
"""

import dataclasses
import importlib
import inspect
from functools import cache, wraps
from typing import Any

import torch

from . import memory
from .stand_ins import TorchView

# Modules that create streams and events, ask CUDA about the device or allocate the caches.
_VIEWED = (
    'lmdeploy.pytorch.engine.engine',
    'lmdeploy.pytorch.engine.logits_process',
    'lmdeploy.pytorch.engine.cache_engine.engine',
    'lmdeploy.pytorch.engine.cache_engine.layout',
    'lmdeploy.pytorch.engine.model_agent.agent',
    'lmdeploy.pytorch.engine.model_agent.inputs_maker',
    'lmdeploy.pytorch.engine.executor.mp_executor',
    'lmdeploy.pytorch.models.patch',
)


@cache
def install() -> None:
    """Make this process's LMDeploy engine run on the CPU; repeating it does nothing."""
    view = TorchView()
    for name in _VIEWED:
        module: Any = importlib.import_module(name)
        module.torch = view
    _select_backend()
    _patch_model_agent(importlib.import_module('lmdeploy.pytorch.engine.model_agent.agent'))
    _patch_cache_allocation()
    _patch_default_devices()


def installed() -> bool:
    """Whether :func:`install` has run in this process."""
    return install.cache_info().currsize > 0


def _select_backend() -> None:
    """Answer LMDeploy's question for the backend of ``cuda`` with the CPU backend."""
    from lmdeploy.pytorch.backends import selector

    from .backend import CpuOpsBackend

    original = selector._get_backend

    def _get_backend():
        device_type = selector.get_device_manager().current_context().device_type
        return CpuOpsBackend if device_type == 'cuda' else original()

    selector._get_backend = _get_backend


def _patch_model_agent(agent: Any) -> None:
    """Give the model agent the CPU as its device, inputs of its own, and no warm-up.

    There is nothing to warm up: no kernel is compiled or tuned and no graph is captured.
    """
    init = agent.BaseModelAgent.__init__

    @wraps(init)
    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        init(self, *args, **kwargs)
        self.device = 'cpu'

    start = agent.BaseModelAgent.start

    @wraps(start)
    def start_on_host(self, *args: Any, **kwargs: Any) -> None:
        memory.choose_threads(self.patched_model.get_model())
        start(self, *args, **kwargs)

    agent.BaseModelAgent.__init__ = __init__
    agent.BaseModelAgent.start = start_on_host
    agent.BaseModelAgent.warmup = lambda self: None
    agent._try_to_cuda = _own_copy
    agent.get_gpu_memory = lambda device_id=None: TorchView.cuda.mem_get_info(device_id)


def _own_copy(value: Any, non_blocking: bool = False) -> Any:
    """Copy a forward input: moved to a GPU it would be a copy, and the agent changes some of its tensors in place."""
    del non_blocking
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value.clone()
    value = value.to_device('cpu')
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        tensor = getattr(value, field.name)
        if isinstance(tensor, torch.Tensor):
            setattr(value, field.name, tensor.clone())
    return value


def _patch_cache_allocation() -> None:
    """Allocate block and state caches that LMDeploy asks for on ``cuda`` in host memory."""
    from lmdeploy.pytorch.engine.cache_engine import state
    from lmdeploy.pytorch.engine.cache_engine.plan import BlockCachePlan

    def on_host(function):
        @wraps(function)
        def wrapper(*args: Any, device: torch.device | str, **kwargs: Any) -> Any:
            return function(*args, device=TorchView.device(device), **kwargs)

        return wrapper

    BlockCachePlan.allocate = on_host(BlockCachePlan.allocate)
    state._allocate_state_caches = on_host(state._allocate_state_caches)


def _patch_default_devices() -> None:
    """Let layers that are built without a device be built on the CPU instead of ``cuda``."""
    from lmdeploy.pytorch.nn import embedding, norm

    for owner in (norm.RMSNorm, norm.LayerNorm, embedding.ParallelEmbedding):
        owner.create_weight = staticmethod(_with_device(owner.create_weight))


def _with_device(create_weight):
    signature = inspect.signature(create_weight)

    @wraps(create_weight)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get('device') is None:
            bound.arguments['device'] = 'cpu'
        return create_weight(*bound.args, **bound.kwargs)

    return wrapper
