"""Random weights of any size, streamed into safetensors shards: what is in memory does not grow with the checkpoint.

Values are copied from a pool of normal ones, from another place for every piece, since drawing ten billion of them
would take minutes. A shard's header follows from the shapes alone and is written before its tensors.
"""

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmdeploy_vico.checkpoints.files import INDEX_FILE, Shape

Shapes = Mapping[str, Shape]

ITEM = 2  # bytes of a bfloat16
SHARD = 4 * 10**9  # bytes of the tensors of a shard, unless one alone is larger
LANGUAGE_MODEL = 'language_model.'
POOL, PIECE = 2**24, 2**22  # values that are drawn, and the most that are taken from one place
LAYER_SCALE = 0.1
LAYER_SCALES = ('.ls1', '.ls2')
# These are looked up, not multiplied with: nothing is added up over their width.
LOOKED_UP = ('class_embedding', 'position_embedding', 'query_token', 'embed_tokens.weight')


def nbytes(shapes: Shapes) -> int:
    """Bytes of the tensors."""
    return sum(ITEM * math.prod(shape) for shape in shapes.values())


def plan(shapes: Shapes, limit: int = SHARD) -> dict[str, dict[str, Shape]]:
    """The files and which tensors each holds, in their order.

    The language model begins a file, so that a copy of the checkpoint without a router, as a benchmark's baseline needs
    it, can share all files but the first.
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
    return {f'model-{i:05d}-of-{len(shards):05d}.safetensors': shard for i, shard in enumerate(shards, 1)}


def space_needed(shards: Mapping[str, Shapes]) -> int:
    """Bytes of all files of a plan and their index."""
    return sum(len(header(shard)) + nbytes(shard) for shard in shards.values()) + len(_index(shards))


def write(path: Path, shards: Mapping[str, Shapes], seed: int, done: Callable[[int], object]) -> None:
    """Write the files of a plan into the directory, the index last: weights without it are those of a broken-off run.

    The same plan and seed give the same bytes. ``done`` is told after every few megabytes how many bytes it were.
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
    """What a safetensors file has before its tensors: eight bytes of length, and a JSON that says where each lies."""
    places: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + nbytes({name: shape})
        places[name] = {'dtype': 'BF16', 'shape': list(shape), 'data_offsets': [start, end]}
    text = json.dumps(places, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    return struct.pack('<Q', len(text)) + text


def _index(shards: Mapping[str, Shapes]) -> str:
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    total = sum(map(nbytes, shards.values()))
    return json.dumps({'metadata': {'total_size': total}, 'weight_map': dict(sorted(weight_map.items()))}, indent=2)


class Values:
    """The bytes of bfloat16 tensors whose activations stay finite and about as large at any depth.

    Biases are 0, layer scales 0.1 and other vectors 1, as they belong to norms; matrices are normal with a variance of
    1 / fan-in. What a tensor holds depends on the seed, its name and its shape alone.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._normal = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
        self._scaled: dict[float, memoryview] = {}  # a model has no ten different widths

    def pieces(self, name: str, shape: Shape) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces of a few megabytes."""
        count, std = math.prod(shape), deviation(name, shape)
        pool = self._pool(std) if std else _as_bytes(torch.full((min(count, PIECE),), constant(name)))
        places = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        for start in range(0, count, PIECE):
            size = min(PIECE, count - start)
            place = int(places.integers(len(pool) // ITEM - size + 1))
            yield pool[place * ITEM : (place + size) * ITEM]

    def _pool(self, std: float) -> memoryview:
        if std not in self._scaled:
            self._scaled[std] = _as_bytes(self._normal * std)
        return self._scaled[std]


def deviation(name: str, shape: Shape) -> float:
    """The standard deviation of a tensor's values; 0 where all are the same."""
    if len(shape) < 2 or name.endswith('bias'):
        return 0.0
    return 1.0 if name.endswith(LOOKED_UP) else math.prod(shape[1:]) ** -0.5


def constant(name: str) -> float:
    """The value of all elements of a vector."""
    if name.endswith('bias'):
        return 0.0
    return LAYER_SCALE if name.endswith(LAYER_SCALES) else 1.0


def _as_bytes(values: torch.Tensor) -> memoryview:
    return values.to(torch.bfloat16).view(torch.uint8).numpy().data
