"""Random weights of any size, streamed into safetensors files, so that memory does not grow with the checkpoint.

To draw ten billion normal values would take minutes. They are copied from a pool instead, from another place for every
piece. A file's header follows from the shapes alone and is written before its tensors.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from lmdeploy_vico.checkpoints.initialisation import spread
from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL, Shape
from lmdeploy_vico.checkpoints.safetensors_format import (
    INDEX_FILE,
    StoredTensor,
    header_bytes,
    index_text,
    shard_names,
)

Shapes = Mapping[str, Shape]

ITEM = 2  # bytes of a bfloat16
SHARD = 4 * 10**9  # bytes of the tensors of a shard, unless one alone is larger
POOL = 2**24  # values that are drawn
PIECE = 2**22  # the most of them that are copied from one place


def nbytes(shapes: Shapes) -> int:
    """Return the bytes of bfloat16 tensors."""
    return sum(ITEM * math.prod(shape) for shape in shapes.values())


def plan(shapes: Shapes, limit: int = SHARD) -> dict[str, dict[str, Shape]]:
    """Distribute tensors over files: the tensors of each file by its name, in order.

    The language model begins a file of its own, so that a copy of the checkpoint without a router (a benchmark's
    baseline) can share all files but the first.
    """
    shards: list[dict[str, Shape]] = []
    before, filled = None, 0
    for name, shape in shapes.items():
        side, size = name.startswith(LANGUAGE_MODEL), nbytes({name: shape})
        if side != before or filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        before, filled = side, filled + size
    return dict(zip(shard_names(len(shards)), shards, strict=True))


def space_needed(shards: Mapping[str, Shapes]) -> int:
    """Return the bytes of all files of a plan and their index."""
    return sum(len(header(shard)) + nbytes(shard) for shard in shards.values()) + len(_index(shards))


def write(path: Path, shards: Mapping[str, Shapes], seed: int, done: Callable[[int], object]) -> None:
    """Write the files of a plan into the directory. The index comes last: weights without it are from a broken-off run.

    The same plan and seed give the same bytes. ``done`` is called every few megabytes with the number of bytes written
    since the last call.
    """
    values = Values(seed)
    for file, shapes in shards.items():
        with (path / file).open('wb') as output:
            output.write(header(shapes))
            for name, shape in shapes.items():
                for piece in values.pieces(name, shape):
                    output.write(piece)
                    done(len(piece))
    (path / INDEX_FILE).write_text(_index(shards), encoding='utf-8')


def header(shapes: Shapes) -> bytes:
    """The header of a file of bfloat16 tensors."""
    tensors, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + nbytes({name: shape})
        tensors[name] = StoredTensor('BF16', shape, start, end)
    return header_bytes(tensors, {'format': 'pt'})


def _index(shards: Mapping[str, Shapes]) -> str:
    files = {name: file for file, shapes in shards.items() for name in shapes}
    return index_text(files, total_size=sum(map(nbytes, shards.values())))


class Values:
    """The bytes of bfloat16 tensors with the values of :func:`~lmdeploy_vico.checkpoints.initialisation.spread`.

    What a tensor holds depends on the seed, its name and its shape alone.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._normal = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
        self._scaled: dict[float, memoryview] = {}  # a model has no ten different widths

    def pieces(self, name: str, shape: Shape) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces of a few megabytes."""
        count, wanted = math.prod(shape), spread(name, shape)
        pool = self._pool(wanted.std) if wanted.std else _as_bytes(torch.full((min(count, PIECE),), wanted.mean))
        places = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        for start in range(0, count, PIECE):
            size = min(PIECE, count - start)
            place = int(places.integers(len(pool) // ITEM - size + 1))
            yield pool[place * ITEM : (place + size) * ITEM]

    def _pool(self, std: float) -> memoryview:
        if std not in self._scaled:
            self._scaled[std] = _as_bytes(self._normal * std)
        return self._scaled[std]


def _as_bytes(values: torch.Tensor) -> memoryview:
    return values.to(torch.bfloat16).view(torch.uint8).numpy().data
