"""Which implementation of the operations runs: the Triton kernels or plain torch.

"auto" takes Triton where its kernels can run (on CUDA devices, and on the CPU under Triton's interpreter, that is with
``TRITON_INTERPRET=1`` in the environment before triton is imported) and torch elsewhere. :func:`use` overrides it for
the process. The choice is logged once per device; asking for one that cannot run raises.
"""

import logging
from dataclasses import dataclass
from functools import cache

import torch
import triton

AUTO, TRITON, TORCH = CHOICES = ('auto', 'triton', 'torch')
# Read when a kernel is defined, so it holds for the whole process.
INTERPRETED = triton.knobs.runtime.interpret

_requested = AUTO


def use(choice: str) -> None:
    """Override the implementation in this process: "auto", "triton" or "torch"."""
    global _requested
    if choice not in CHOICES:
        raise ValueError(f'kernels must be one of {", ".join(CHOICES)}, not {choice!r}')
    _requested = choice


def requested() -> str:
    """What :func:`use` was last given."""
    return _requested


def implementation(device: torch.device) -> str:
    """What runs on tensors of this device: "triton" or "torch".

    Raises:
        RuntimeError: "triton" was asked for, and cannot run on this device.
    """
    return _resolve(_requested, device.type)


@cache
def _resolve(choice: str, device_type: str) -> str:
    obstacle = _obstacle(device_type)
    if choice == TRITON and obstacle:
        raise RuntimeError(f'The Triton kernels were asked for, but {obstacle}')
    chosen = TORCH if choice == TORCH or obstacle else TRITON
    detail = " (Triton's interpreter)" if chosen == TRITON and INTERPRETED else ''
    logging.getLogger('lmdeploy_vico').info('vision kernels on %s: %s%s', device_type, chosen, detail)
    return chosen


def _obstacle(device_type: str) -> str:
    """Why the Triton kernels cannot run on this type of device; empty where they can."""
    if INTERPRETED:
        return '' if device_type == 'cpu' else "Triton's interpreter (TRITON_INTERPRET=1) works on the CPU only."
    if device_type == 'cuda':
        return ''
    return f'they do not run on {device_type!r} devices (on the CPU: with TRITON_INTERPRET=1, for tests).'


_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], device: torch.device | None = None) -> None:
    """Raise ValueError naming the argument unless it has this shape (None: any), a float dtype and the device."""
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ', '.join('any' if size is None else str(size) for size in shape)
        raise ValueError(f'{name}: expected shape [{wanted}], not {list(tensor.shape)}')
    if tensor.dtype not in _TYPES:
        raise ValueError(f'{name}: expected float32, float16 or bfloat16, not {tensor.dtype}')
    if device is not None and tensor.device != device:
        raise ValueError(f'{name}: expected on {device}, not on {tensor.device}')


@dataclass(frozen=True)
class Limits:
    """What bounds a launch: multiprocessors, and the shared memory of one program in bytes."""

    processors: int
    shared_memory: int


@cache
def device_limits(device: torch.device) -> Limits:
    """The limits of a CUDA device; in the interpreter those of a small one, so that work is split there as well."""
    if device.type != 'cuda':
        return Limits(processors=8, shared_memory=100_000)
    properties = torch.cuda.get_device_properties(device)
    return Limits(properties.multi_processor_count, properties.shared_memory_per_block_optin)
