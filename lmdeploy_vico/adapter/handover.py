"""How visual tokens travel from the API process to the engine's: as bytes, an object for each span.

What is copied where, and who owns the memory:

1. API process, a thread beside the loop: ``PackedRows.of`` copies each span once, from the image's embeddings to bytes.
2. API process, event loop: LMDeploy pickles the request, which copies the bytes into one message; ZMQ takes it over.
3. Engine's process, event loop: LMDeploy takes the message off the socket and unpickles it, one copy each. The
   unpickled bytes are nobody else's, so they become the memory of the spans' tensors as they are.
4. To the workers: spans.py.

A tensor would take a small file of its own in the pickle, built and parsed each time. Nothing is shared between the
processes that could stay behind when one of them dies. ``python -m benchmarks handover`` compares the alternatives.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pickle import PickleBuffer
from typing import Any

import numpy as np
import torch

# Parameters of glibc's mallopt, as <malloc.h> numbers them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
KEPT = 128 * 2**20  # bytes that stay with an arena; the message of twenty tiles at H = 5120 takes 75 MiB while it grows


@dataclass(frozen=True)
class Span:
    """Visual tokens that stand together in a prompt, on their way to the engine.

    Attributes:
        embeddings: ``[end - start, H]``.
        start, end: their positions in the prompt, ``end`` not included.
        content_hash: names their content for LMDeploy's prefix cache.
    """

    embeddings: 'PackedRows'
    start: int
    end: int
    content_hash: str

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class PackedRows:
    """Visual tokens, row after row, with their dtype and the number of values in a row."""

    data: Any  # bytes, or what has a buffer: PickleBuffer where pickled, and what the unpickler makes of it
    dtype: torch.dtype
    width: int

    @classmethod
    def of(cls, embeddings: torch.Tensor) -> 'PackedRows':
        """Pack ``[n, H]`` of any dtype, from any device, whatever its strides."""
        keep_freed_memory()
        return cls(_bytes_of(embeddings).tobytes(), embeddings.dtype, embeddings.shape[1])

    @classmethod
    def lent(cls, embeddings: torch.Tensor) -> 'PackedRows':
        """The same for pickle's protocol 5, without a copy where the rows lie one after the other on the CPU.

        The pickler copies the rows, or hands them to whoever writes the message; they must not change before that.
        """
        return cls(PickleBuffer(_bytes_of(embeddings)), embeddings.dtype, embeddings.shape[1])  # type: ignore[arg-type]

    def tensor(self) -> torch.Tensor:
        """``[n, H]`` on the CPU.

        Bytes and bytearrays, which an unpickler has just made, become the tensor's memory: LMDeploy may write to it and
        send it on. So does what is read-only, which is a part of Ray's object store: it is every rank's, must only be
        read, and stays in the store as long as the tensor lives. Of memory that somebody may write to a copy is made.
        """
        keep_freed_memory()
        return torch.from_numpy(_array(self.data)).view(self.dtype).view(-1, self.width)


def _array(data: Any) -> np.ndarray:
    """The bytes of what has a buffer, in its memory but where that is somebody's who writes to it.

    PyTorch makes tensors only of arrays that say they can be written to.
    """
    if isinstance(data, bytes):
        array = np.empty(0, np.uint8)
        # That it can be written to, as bytes cannot, is what NumPy does with the bytes of an array it unpickles.
        array.__setstate__((1, (len(data),), array.dtype, False, data))  # type: ignore[arg-type]
        return array
    if isinstance(data, bytearray) or not memoryview(data).readonly:
        return np.frombuffer(data if isinstance(data, bytearray) else bytearray(data), np.uint8)
    size = memoryview(data).nbytes
    memory = (ctypes.c_ubyte * size).from_address(np.frombuffer(data, np.uint8).ctypes.data)
    memory.owner = data  # type: ignore[attr-defined]  # which gives the memory back when it is freed
    return np.frombuffer(memory, np.uint8)  # type: ignore[call-overload]


def _bytes_of(embeddings: torch.Tensor) -> np.ndarray:
    """The bytes of all rows, in the tensor's own memory if they lie one after the other on the CPU."""
    array: np.ndarray = embeddings.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return array


@cache
def keep_freed_memory() -> None:
    """Have the C library keep large blocks that are freed, rather than give them back and take them anew.

    glibc maps a block above a threshold by itself, and the kernel then clears it page by page when it is written: for
    the megabytes of a request, once when it is pickled, again when it is given to the socket, and so on, that takes
    several times as long as copying. The threshold rises to 32 MiB at most, and a pickle grows to one and a half times
    its size before it is cut to it. So no block is mapped by itself any more; what is freed at the end of an arena goes
    back to the kernel above ``KEPT``. In arenas of threads, of 64 MiB at most, glibc still maps what does not fit.

    It concerns the whole process: up to ``KEPT`` bytes an arena stay resident after a peak, and a small block that
    outlives larger ones before it keeps them from going back. Other C libraries have no ``mallopt`` and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, KEPT)
