"""A prompt's visual tokens for the hand-over's benchmarks, and what a thread uses while it hands them over."""

import mmap
import statistics
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from benchmarks.lib.timing import Meter

DTYPE = torch.bfloat16
BLOCK = 64  # tokens of a KV block
TOKENS = {
    'ten tiles': 2560,
    'ten tiles, 75 % compressed': 1120,  # round half up of 7.5 are 8: 8 * 64 + 2 * 256
    'twenty tiles': 5120,
}


@lru_cache(maxsize=1)
def embeddings(tokens: int, width: int) -> torch.Tensor:
    """``[tokens, width]``, the same in every process; not to be written to."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(DTYPE)


def cuts(tokens: int) -> list[tuple[int, int]]:
    """Where the spans begin and end."""
    return list(pairwise([0, *range(BLOCK, tokens, BLOCK), tokens]))


class Copier:
    """Copies as many bytes as visual tokens have, from array to array, for how fast this machine copies right now.

    The arrays' pages are there already, and are mapped: freed blocks of theirs would change what the C library keeps.
    """

    def __init__(self) -> None:
        self.source = self.target = np.empty(0, np.uint8)

    def __call__(self, size: int) -> float:
        """Seconds of a processor for one copy of so many bytes."""
        if len(self.source) != size:
            self.source, self.target = (
                np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE), np.uint8) for _ in range(2)
            )
            self.source[:], self.target[:] = 1, 0
        meter = Meter()
        np.copyto(self.target, self.source)
        return meter()['processor']


def copy_milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """The copies of a row."""
    return {name: round(pick(seconds) * 1e3, 2) for name, pick in (('median', statistics.median), ('least', min))}
