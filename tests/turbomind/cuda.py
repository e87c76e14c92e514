"""Answers to what LMDeploy asks ``torch.cuda`` until it has built TurboMind; nothing is computed on a device."""

import contextlib
from types import ModuleType, SimpleNamespace
from typing import Any

GIB = 2**30


def pretend(cuda: ModuleType) -> None:
    """Make ``torch.cuda`` say that there is one device, on which tensors stay where they are."""
    import torch

    properties = SimpleNamespace(name='a stand-in', major=9, minor=0, total_memory=8 * GIB, multi_processor_count=1)
    answers: dict[str, Any] = {
        'is_available': True,
        'device_count': 1,
        'current_device': 0,
        'get_device_name': properties.name,
        'get_device_properties': properties,
        'get_device_capability': (9, 0),
        'mem_get_info': (8 * GIB, 8 * GIB),
        'empty_cache': None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    cuda.device = lambda *args: contextlib.nullcontext()  # type: ignore[attr-defined]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
