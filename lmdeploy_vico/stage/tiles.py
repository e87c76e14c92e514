"""Distinct tiles: those on their way, shared by all prompts that show them, and those kept for prompts to come."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np
import torch

from lmdeploy_vico.stage.metrics import stage_metrics


@dataclass(eq=False)
class Tile:
    """One distinct tile. The ViT-level results serve any routing, so they outlive the request that caused them.

    Attributes:
        digest: names the pixels.
        pixels: uint8 ``[448, 448, 3]``, until it is encoded.
        taken: whether it is on a device, or has been.
        failed_on: the devices that have failed on it, once for each time.
        error: why it is given up.
        patches: ``[1024, D]`` once it is encoded, in host memory.
        score: the router's p[0].
    """

    digest: bytes
    pixels: np.ndarray | None
    taken: bool = False
    failed_on: list[int] = field(default_factory=list)
    error: Exception | None = None
    patches: torch.Tensor | None = None
    score: float = 0.0

    @property
    def encoded(self) -> bool:
        """Whether its features are there."""
        return self.patches is not None


@dataclass(frozen=True)
class _Kept:
    """What is kept of a tile: not the tile itself, so that a tile lives exactly as long as somebody works with it."""

    patches: torch.Tensor
    score: float


class TileCache:
    """The tiles of a stage by content. Safe to use from several threads.

    A cache belongs to one checkpoint in one dtype, so that a tile's pixels are all that its features depend on. Tiles
    that a prompt holds are found whether or not there is room to keep them: what is in flight is encoded once.

    Args:
        capacity: bytes of features to keep, the least recently used going first; 0 keeps none.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._in_use: WeakValueDictionary[bytes, Tile] = WeakValueDictionary()
        self._bytes = 0
        self._metrics = stage_metrics()

    def get(self, digests: Sequence[bytes], pixels: np.ndarray) -> list[Tile]:
        """The tiles of an image; those that are neither kept nor in use are made from its ``pixels``."""
        with self._lock:
            return [self._get(digest, tile) for digest, tile in zip(digests, pixels, strict=True)]

    def _get(self, digest: bytes, pixels: np.ndarray) -> Tile:
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
            tile = Tile(digest, None, taken=True, patches=kept.patches, score=kept.score)
        self._in_use[digest] = tile
        return tile

    def keep(self, tile: Tile) -> None:
        """Keep an encoded tile, and let go of the least recently used ones for which there is no more room."""
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
        """Let go of the least recently used tile that no prompt holds, whose memory becomes free; False if none is."""
        with self._lock:
            digest = next((digest for digest in self._kept if digest not in self._in_use), None)
            if digest is None:
                return False
            self._evict(digest)
            self._metrics.cache_bytes.set(self._bytes)
            return True

    def clear(self) -> None:
        """Let go of all that is kept."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0
            self._metrics.cache_bytes.set(0)

    def _evict(self, digest: bytes) -> None:
        self._bytes -= self._kept.pop(digest).patches.nbytes
        self._metrics.cache_evictions.inc()
