"""How visual tokens travel from the API process to the engine's: as bytes, an object for each span.

LMDeploy pickles requests in its event loop and unpickles them in the engine's. A tensor takes a small file of its own
there, built and parsed each time; bytes are copied, and those of a span become its tensor's memory where they arrive.
Nothing is shared between the processes that could stay behind when one of them dies. ``benchmarks/handover.py``
compares this with the alternatives.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

LARGEST_KEPT = 32 * 2**20 - 2**16  # bytes; glibc never raises its threshold beyond 32 MiB


@dataclass(frozen=True)
class PackedRows:
    """Visual tokens, row after row, with their dtype and the number of values in a row."""

    data: bytes
    dtype: torch.dtype
    width: int

    @classmethod
    def of(cls, embeddings: torch.Tensor) -> 'PackedRows':
        """Pack ``[n, H]`` of any dtype, from any device, whatever its strides."""
        keep_freed_memory()
        rows = embeddings.detach().cpu().contiguous()
        return cls(rows.view(torch.uint8).numpy().tobytes(), rows.dtype, rows.shape[1])

    def tensor(self) -> torch.Tensor:
        """``[n, H]`` on the CPU, in the memory of these bytes and no other rows': LMDeploy may send it on.

        That it can be written to, as bytes cannot, is what NumPy does with the bytes of an array that it unpickles.
        """
        keep_freed_memory()
        array = np.empty(0, np.uint8)
        array.__setstate__((1, (len(self.data),), array.dtype, False, self.data))
        return torch.from_numpy(array).view(self.dtype).view(-1, self.width)


@cache
def keep_freed_memory() -> None:
    """Have the C library keep large blocks that are freed, rather than give them back and take them anew.

    glibc maps a block above a threshold by itself, and the kernel then clears it page by page when it is written: for
    the megabytes of a request, once when it is pickled, again when it is given to the socket, and so on, that takes
    several times as long as copying. The threshold becomes the size of the largest block that has ever been freed, but
    a pickle grows to one and a half times its size before it is cut to it, and so remains above the threshold for ever.
    Freeing a block of the greatest size that counts settles it. Other C libraries take no notice.
    """
    bytes(LARGEST_KEPT)  # zeros, of pages that are never touched
