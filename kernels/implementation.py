"""Which implementation of the operations runs: the Triton kernels or plain torch.

"auto" takes Triton where its kernels can run (on CUDA devices, and on the CPU under Triton's interpreter, that is with
``TRITON_INTERPRET=1`` in the environment before triton is imported) and torch elsewhere. :func:`use` overrides it for
the process. The choice is logged once per device; asking for one that cannot run raises.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton

from lmdeploy_vico.kernels.choice import AUTO, CHOICES, TORCH, TRITON

# Read when a kernel is defined, so it holds for the whole process.
INTERPRETED = triton.knobs.runtime.interpret
LEAST_CAPABILITY = (8, 0)  # bfloat16 matrix instructions and asynchronous copies

logger = logging.getLogger(__name__)
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
    return _resolve(_requested, device)


def refusal(device: torch.device) -> str | None:
    """Why what was asked for cannot run on this device, as :func:`implementation` says it; None where it can."""
    return _refusal(_requested, device)


def _refusal(choice: str, device: torch.device) -> str | None:
    obstacle = _obstacle(device) if choice == TRITON else None
    return f'The Triton kernels were asked for, but {obstacle}' if obstacle else None


@cache
def _resolve(choice: str, device: torch.device) -> str:
    if refused := _refusal(choice, device):
        raise RuntimeError(refused)
    chosen = TORCH if choice == TORCH or _obstacle(device) else TRITON
    detail = " (Triton's interpreter)" if chosen == TRITON and INTERPRETED else ''
    logger.info('vision kernels on %s: %s%s', device, chosen, detail)
    return chosen


def _obstacle(device: torch.device) -> str:
    """Why the Triton kernels cannot run on this device; empty where they can."""
    if INTERPRETED:
        return '' if device.type == 'cpu' else "Triton's interpreter (TRITON_INTERPRET=1) works on the CPU only."
    if device.type != 'cuda':
        return f'they do not run on {device.type!r} devices (on the CPU: with TRITON_INTERPRET=1, for tests).'
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        wanted, given = ('.'.join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
        return f'they need compute capability {wanted}, and {device} has {given}.'
    return ''


def refuse_gradients(operation: str, *operands: torch.Tensor | None) -> None:
    """Raise RuntimeError if autograd would need a gradient of a Triton kernel: it has none, and would be left out."""
    if torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands):
        raise RuntimeError(f'The Triton kernel {operation} has no gradient: set kernels to "torch" to train.')


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever the tensors are on: make it theirs."""
    return torch.cuda.device(device) if device.type == 'cuda' else nullcontext()


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
    """The limits of a CUDA device; in the interpreter those of one with few multiprocessors."""
    if device.type != 'cuda':
        return Limits(processors=8, shared_memory=232_448)
    properties = torch.cuda.get_device_properties(device)
    return Limits(properties.multi_processor_count, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
