"""Distinct tiles: those in use, shared by all prompts that show them, and a cache for prompts to come."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np
import torch

from lmdeploy_vico.stage.metrics import stage_metrics

REMEMBERED_BYTES = 512  # about what the objects and the dictionary entry take


@dataclass(eq=False)
class Elsewhere:
    """Stands for the features of a tile that lie with an encoder elsewhere, as long as that lives and keeps them.

    Attributes:
        incarnation: of the encoder; one that is started again has another.
    """

    incarnation: str

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that remembering them takes here, with the tile's digest and score."""
        return REMEMBERED_BYTES


@dataclass(eq=False)
class Tile:
    """One distinct tile. Its features serve any routing, so they may outlive the request that caused them.

    Attributes:
        digest: of the pixels and the salt of the request that showed them.
        pixels: uint8 ``[448, 448, 3]``; None once the tile is encoded here. Features elsewhere may be lost with their
            encoder, and are made again of these.
        taken: whether no device is to take it: one has it, or it is encoded or given up.
        failed_on: the number of each device that has failed on it, once for each failure.
        error: of the last failure, if the tile has been given up.
        patches: ``[1024, D]`` in host memory, or where they lie; None until the tile is encoded.
        score: the router's p[0], once the tile is encoded.
    """

    digest: bytes
    pixels: np.ndarray | None
    taken: bool = False
    failed_on: list[int] = field(default_factory=list)
    error: Exception | None = None
    patches: torch.Tensor | Elsewhere | None = None
    score: float = 0.0

    @property
    def encoded(self) -> bool:
        """Whether the tile has its features."""
        return self.patches is not None


@dataclass(frozen=True)
class _Kept:
    """The features of a tile that is kept. Not the tile: a tile lives only as long as a prompt or a batch holds it."""

    patches: torch.Tensor | Elsewhere
    score: float


class TileCache:
    """Finds the tiles of a stage by their content. Safe to use from several threads.

    A cache belongs to one checkpoint in one dtype, so that a tile's features depend on its pixels alone. The salt in
    its digest makes no difference to them: it keeps clients from learning by a hit what others have shown. A tile that
    a prompt holds is found even if there is no room to keep it, so that no tile is encoded twice at the same time.

    Args:
        capacity: bytes of features to keep. The least recently used are dropped first; 0 keeps none.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._in_use: WeakValueDictionary[bytes, Tile] = WeakValueDictionary()
        self._bytes = 0
        self._metrics = stage_metrics()

    def get(self, digests: Sequence[bytes], pixels: Sequence[np.ndarray | None] | np.ndarray) -> list[Tile]:
        """Return the tiles of an image, and make new ones for those that are neither kept nor in use.

        Args:
            digests: of each tile.
            pixels: uint8 ``[n, 448, 448, 3]``, or None for each tile whose pixels somebody else holds.
        """
        with self._lock:
            return [self._get(digest, tile) for digest, tile in zip(digests, pixels, strict=True)]

    def _get(self, digest: bytes, pixels: np.ndarray | None) -> Tile:
        tile = self._in_use.get(digest)
        kept = self._kept.get(digest)
        if kept is not None:
            self._kept.move_to_end(digest)
        if tile is not None and tile.error is None:
            self._metrics.cache_hits.inc()
            return tile
        if kept is None:
            self._metrics.cache_misses.inc()
            tile = Tile(digest, pixels)
        else:
            self._metrics.cache_hits.inc()
            kept_pixels = pixels if isinstance(kept.patches, Elsewhere) else None
            tile = Tile(digest, kept_pixels, taken=True, patches=kept.patches, score=kept.score)
        self._in_use[digest] = tile
        return tile

    def keep(self, tile: Tile) -> None:
        """Keep an encoded tile's features, dropping the least recently used ones to make room."""
        assert tile.patches is not None
        size = tile.patches.nbytes
        if size > self.capacity:
            return
        with self._lock:
            if tile.digest in self._kept:
                return
            while self._bytes + size > self.capacity:
                self._evict(next(iter(self._kept)))
            self._kept[tile.digest] = _Kept(tile.patches, tile.score)
            self._bytes += size
            self._metrics.cache_bytes.set(self._bytes)

    def evict(self) -> bool:
        """Drop the least recently used tile that no prompt holds, which frees its memory.

        Returns:
            Whether there was such a tile.
        """
        with self._lock:
            digest = next((digest for digest in self._kept if digest not in self._in_use), None)
            if digest is None:
                return False
            self._evict(digest)
            self._metrics.cache_bytes.set(self._bytes)
            return True

    def clear(self) -> None:
        """Drop everything that is kept."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0
            self._metrics.cache_bytes.set(0)

    def _evict(self, digest: bytes) -> None:
        self._bytes -= self._kept.pop(digest).patches.nbytes
        self._metrics.cache_evictions.inc()
