"""Pinned host memory that is taken once and lent in pieces, since pinning is slow: milliseconds for a few tiles."""

import logging
import threading
import time
import weakref
from bisect import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from math import prod
from typing import Protocol

import numpy as np
import torch

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes; what copies by a device like
LARGEST_BLOCK = 2**30  # bytes; whatever is pinned can be lent while the next block is being pinned


class ResultMemory(Protocol):
    """Lends pinned host memory for the results of one checkpoint's devices."""

    def tiles(self, count: int) -> list[torch.Tensor | None]:
        """``[1024, D]`` in the encoder's dtype for each of so many tiles; None for those that find no room."""

    def rows(self, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """``[count, H]`` for a prompt's visual tokens, or None if there is no room."""


class PinnedArena:
    """Pinned host memory, taken block by block in a thread of its own. Safe to use from several threads.

    What it lends is a tensor with a storage of its own, which comes back when that storage dies: with the last tensor
    that shows any part of it, in whatever thread. The arena knows of no copies. Whoever has a device copy from or to a
    piece holds it until the host has waited for that copy.

    PyTorch rounds pinned memory up to powers of two. So blocks are powers of two, and each but the last of as many
    bytes as can be filled: what is lost is less than a piece for each block. Where the host refuses a block, half of it
    is tried, down to the size of a piece.

    Args:
        count: how many pieces there shall be room for.
        piece: bytes of one; smaller and larger ones can be asked for as well.
        device: whose CUDA context pins the memory, which serves every other device too.
        name: what the pieces are, for the log.
    """

    def __init__(self, count: int, piece: int, device: torch.device, name: str) -> None:
        self._count, self._piece, self._device, self._name = count, _aligned(piece), device, name
        self._changed = threading.Condition()
        self._pinning, self._closed = True, False
        self._blocks: list[np.ndarray] = []
        self._bases: list[int] = []  # of the blocks, in a numbering of all bytes in which no two blocks touch
        self._free: list[tuple[int, int]] = []  # [start, end) in that numbering, ascending, none touching another
        # A garbage collection may give something back in the midst of anything, so that takes no lock.
        self._returned: deque[tuple[int, int]] = deque()
        self._thread = threading.Thread(target=self._pin, name=f'vico-pin-{name}', daemon=True)
        self._thread.start()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor of uninitialised pinned memory, or None if there is no room.

        As long as memory is still being pinned, this waits rather than find no room.
        """
        size = prod(shape) * dtype.itemsize
        with self._changed:
            while (start := self._find(_aligned(size))) is None and self._pinning:
                self._changed.wait()
            if start is None:
                return None
            index = bisect(self._bases, start) - 1
            offset = start - self._bases[index]
            piece = self._blocks[index][offset : offset + size]
        # The storage of a tensor made from an array holds that array and nothing else does.
        weakref.finalize(piece, self._returned.append, (start, start + _aligned(size))).atexit = False
        return torch.from_numpy(piece).view(dtype).view(*shape)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in memory of this arena."""
        address = tensor.data_ptr()
        return any(0 <= address - block.ctypes.data < block.nbytes for block in self._blocks)

    def close(self) -> None:
        """Lend nothing more; the memory goes when the last piece has come back."""
        self._closed = True
        self._thread.join()
        with self._changed:
            self._blocks, self._bases, self._free = [], [], []
            self._returned = deque()

    def _pin(self) -> None:
        began = time.perf_counter()
        try:
            with torch.cuda.device(self._device):
                self._pin_blocks()
            logger.info(
                '%.2f GiB of host memory pinned for %s in %.1f s',
                *(self._pinned_bytes() / 2**30, self._name, time.perf_counter() - began),
            )
        except RuntimeError as error:
            logger.warning(
                'only %.2f GiB of host memory could be pinned for %s, beyond which they are copied more slowly: '
                'lower the option cache_bytes or free memory on the host (%s)',
                *(self._pinned_bytes() / 2**30, self._name, error),
            )
        finally:
            with self._changed:
                self._pinning = False
                self._changed.notify_all()

    def _pin_blocks(self) -> None:
        missing, largest = self._count, LARGEST_BLOCK
        while missing > 0 and not self._closed:
            size = next(block_sizes(missing, self._piece, largest))
            try:
                block = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
            except RuntimeError:
                largest = size // 2
                if largest < self._piece:
                    raise
                continue
            with self._changed:
                self._add(block)
                self._changed.notify_all()
            missing -= size // self._piece

    def _pinned_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def _add(self, block: np.ndarray) -> None:
        base = self._bases[-1] + self._blocks[-1].nbytes + ALIGNMENT if self._blocks else 0
        self._blocks.append(block)
        self._bases.append(base)
        self._free.append((base, base + block.nbytes))

    def _find(self, size: int) -> int | None:
        """Take ``size`` bytes from the first gap that has them."""
        while self._returned:
            self._merge(*self._returned.popleft())
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def _merge(self, start: int, end: int) -> None:
        index = bisect(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))


def block_sizes(count: int, piece: int, largest: int = LARGEST_BLOCK) -> Iterator[int]:
    """The powers of two whose blocks have room for ``count`` pieces, and for hardly any more.

    None is larger than ``largest``, a power of two, unless a piece is.
    """
    while count > 0:
        size = min(1 << ((count * piece).bit_length() - 1), largest)
        if size < piece:
            size = 1 << (piece - 1).bit_length()
        yield size
        count -= size // piece


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
