"""What LMDeploy's engine modules see instead of ``torch`` and ``torch.cuda`` on a machine without CUDA.

LMDeploy names the device ``'cuda'`` and uses streams and events in a handful of engine modules. Each of those modules
gets a :class:`TorchView` under its own global name ``torch``: it resolves to PyTorch itself, but for the device's
name and ``torch.cuda``. ``torch`` is not changed, so that a program that runs the engine in its own process keeps its
PyTorch (but for the number of threads, see ``memory.choose_threads``), and the view holds in every thread.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy
import torch

from lmdeploy_vico.host_memory import total_memory

from . import memory


class Stream:
    """A stream of a device that finishes every operation before it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def synchronize(self) -> None:
        """Nothing is pending."""

    def wait_event(self, event: 'Event') -> None:
        """Nothing is pending."""

    def wait_stream(self, stream: 'Stream') -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """Nothing is pending."""
        return True


class Event(Stream):
    """An event that has always happened."""

    def record(self, stream: Stream | None = None) -> None:
        """Nothing is pending."""

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing is pending."""


_DEFAULT_STREAM = Stream()
_Stream: TypeAlias = Stream  # within CudaView, the name is that of an attribute


class CudaView:
    """``torch.cuda`` for one device that is the host's processor."""

    Stream = Stream
    Event = Event

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: _Stream | None) -> Iterator[None]:
        """Run the block; every stream is the same."""
        del stream
        yield

    @staticmethod
    def current_stream(device: Any = None) -> _Stream:
        """Return the only stream that work runs on."""
        del device
        return _DEFAULT_STREAM

    @staticmethod
    def synchronize(device: Any = None) -> None:
        """Nothing is pending."""

    @staticmethod
    def empty_cache() -> None:
        """PyTorch's CPU allocator keeps no cache."""

    @staticmethod
    def set_device(device: Any) -> None:
        """All ranks share the host's processor."""

    @staticmethod
    def current_device() -> torch.device:
        """Return the device that LMDeploy moves weights to when it wakes up."""
        return torch.device('cpu')

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """Return the bytes that the KV cache may be sized from, and the host's memory."""
        del device
        return memory.cache_budget(), total_memory()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _BindingsView:
    """``torch._C`` without the CUDA bindings that LMDeploy calls by name; a CPU build of PyTorch lacks them."""

    @staticmethod
    def _cuda_clearCublasWorkspaces() -> None:  # noqa: N802
        """There is no cuBLAS workspace."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch._C, name)


class TorchView:
    """``torch`` as an engine module of LMDeploy sees it on a machine without CUDA."""

    cuda = CudaView()
    _C = _BindingsView()

    @staticmethod
    def device(device: Any, *args: Any) -> torch.device:
        """Return ``torch.device(device)``, with the CPU for any CUDA device."""
        return torch.device('cpu') if str(device).startswith('cuda') else torch.device(device, *args)

    @staticmethod
    def zeros(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """Return ``torch.zeros``; on the host, memory that is taken page by page when it is first written to.

        A KV cache of gigabytes is then ready at once and costs what is used of it.
        """
        device = None if device is None else TorchView.device(device)
        if kwargs or (device is not None and device.type != 'cpu'):
            return torch.zeros(*size, dtype=dtype, device=device, **kwargs)
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or torch.get_default_dtype()
        return torch.from_numpy(numpy.zeros(shape.numel() * dtype.itemsize, numpy.uint8)).view(dtype).view(shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
