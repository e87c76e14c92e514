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
        self._kept: OrderedDict[bytes, Tile] = OrderedDict()
        self._in_use: WeakValueDictionary[bytes, Tile] = WeakValueDictionary()
        self._bytes = 0
        self._metrics = stage_metrics()

    def get(self, digests: Sequence[bytes], pixels: np.ndarray) -> list[Tile]:
        """The tiles of an image; those that are neither kept nor in use are made from its ``pixels``."""
        with self._lock:
            return [self._get(digest, tile) for digest, tile in zip(digests, pixels, strict=True)]

    def _get(self, digest: bytes, pixels: np.ndarray) -> Tile:
        tile = self._in_use.get(digest)
        if tile is not None and tile.error is None:
            self._metrics.cache_hits.inc()
            if digest in self._kept:
                self._kept.move_to_end(digest)
            return tile
        self._metrics.cache_misses.inc()
        tile = self._in_use[digest] = Tile(digest, pixels)
        return tile

    def keep(self, tile: Tile) -> None:
        """Keep an encoded tile, and let go of the least recently used ones for which there is no more room."""
        size = _bytes(tile)
        if size > self.capacity:
            return
        with self._lock:
            if tile.digest in self._kept:
                return
            while self._bytes + size > self.capacity:
                _, evicted = self._kept.popitem(last=False)
                self._bytes -= _bytes(evicted)
                self._metrics.cache_evictions.inc()
            self._kept[tile.digest] = tile
            self._bytes += size
            self._metrics.cache_bytes.set(self._bytes)


def _bytes(tile: Tile) -> int:
    """Host memory of a tile's features; pinned memory comes in powers of two."""
    assert tile.patches is not None
    size = tile.patches.nbytes
    return 1 << (size - 1).bit_length() if tile.patches.is_pinned() else size
