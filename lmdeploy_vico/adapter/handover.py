"""How visual tokens travel from the API process to the engine's: as bytes, all of an image in one buffer.

LMDeploy pickles requests in its event loop and unpickles them in the engine's. A tensor takes a small file of its own
there, built and parsed each time; bytes are copied. Pickle writes an object once that several others refer to, so that
the spans of an image, cut at KV blocks, bring its buffer along once. Nothing is shared between the processes that
could stay behind when one of them dies. ``benchmarks/handover.py`` compares this with the alternatives.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedEmbeddings:
    """The visual tokens of an image, row after row, with their dtype and the number of values in a row."""

    data: bytes
    dtype: torch.dtype
    width: int

    @classmethod
    def of(cls, embeddings: torch.Tensor) -> 'PackedEmbeddings':
        """Pack ``[n, H]`` of any dtype, from any device, whatever its strides."""
        rows = embeddings.detach().cpu().contiguous()
        return cls(rows.view(torch.uint8).numpy().tobytes(), rows.dtype, rows.shape[1])


@dataclass(frozen=True)
class PackedRows:
    """Rows ``[first, last)`` of a packed image."""

    image: PackedEmbeddings
    first: int
    last: int

    def tensor(self) -> torch.Tensor:
        """``[last - first, H]`` on the CPU, in memory of its own: LMDeploy may send it on to other processes."""
        image = self.image
        row = image.width * image.dtype.itemsize
        copy = bytearray(memoryview(image.data)[self.first * row : self.last * row])
        return torch.frombuffer(copy, dtype=image.dtype).view(-1, image.width)
