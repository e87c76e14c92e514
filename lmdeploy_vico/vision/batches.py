"""Tiles in, patch tokens out, in batches of one fixed size: on a CUDA device as a graph, on a CPU as plain calls."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lmdeploy_vico.vision.tiling import TILE_SHAPE
from lmdeploy_vico.vision.tower import VisionTower


@dataclass(frozen=True)
class TileFeatures:
    """ViT-level results of tiles, in host memory: all that routing and projecting need.

    Attributes:
        patches: ``[1024, D]`` for each tile, in the encoder's dtype; each with memory of its own.
        scores: float32 ``[n]``, the router's p[0] of each tile.
    """

    patches: list[torch.Tensor]
    scores: torch.Tensor


class RunningBatch:
    """A batch on its way; :meth:`wait` returns when its features are there."""

    def __init__(self, features: TileFeatures, seconds: float) -> None:
        self._features, self.seconds = features, seconds

    def wait(self) -> TileFeatures:
        """The features; afterwards ``seconds`` says how long the device took."""
        return self._features


class CpuBatches:
    """Batches on the CPU: computed when they are started."""

    def __init__(self, tower: VisionTower, size: int) -> None:
        self._tower, self._size = tower, size

    def start(self, tiles: Sequence[np.ndarray]) -> RunningBatch:
        """Encode and score at most ``size`` uint8 tiles ``[448, 448, 3]``."""
        began = time.perf_counter()
        batch = torch.zeros(self._size, *TILE_SHAPE, dtype=torch.uint8)
        for place, tile in zip(batch, tiles, strict=False):
            place.copy_(torch.from_numpy(tile))
        patches, scores = self._tower.encode(batch)
        # Of a single tile no copy: all there is besides its patches is the class token.
        rows = list(patches) if self._size == 1 else [row.clone() for row in patches[: len(tiles)]]
        return RunningBatch(TileFeatures(rows, scores[: len(tiles)].clone()), time.perf_counter() - began)


@dataclass
class _Slot:
    """What one of two alternating batches needs of its own, since the next one starts before it is waited for."""

    staging: torch.Tensor
    patches: torch.Tensor
    scores: torch.Tensor
    begun: torch.cuda.Event
    encoded: torch.cuda.Event
    copied: torch.cuda.Event


class _CudaBatch(RunningBatch):
    def __init__(self, features: TileFeatures, slot: _Slot) -> None:
        super().__init__(features, 0.0)
        self._slot = slot

    def wait(self) -> TileFeatures:
        self._slot.copied.synchronize()
        self.seconds = self._slot.begun.elapsed_time(self._slot.encoded) / 1000
        return self._features


class CudaBatches:
    """Batches on a CUDA device, asynchronous; a batch must be waited for before the next but one is started.

    One stream computes, another takes results to pinned host memory meanwhile. Device memory is taken here, once.

    Args:
        tower: on the device.
        size: tiles of every batch.
        device: the tower's.
        graph: replay one CUDA graph instead of launching kernel by kernel.
    """

    def __init__(self, tower: VisionTower, size: int, device: torch.device, graph: bool) -> None:
        self._tower, self._size, self._graph = tower, size, None
        with torch.cuda.device(device):
            self._stream, self._copies = torch.cuda.Stream(), torch.cuda.Stream()
            self._tiles = torch.zeros(size, *TILE_SHAPE, dtype=torch.uint8, device=device)
            self._capture(graph)
            self._slots = itertools.cycle([self._slot(), self._slot()])
            torch.cuda.synchronize()

    @torch.inference_mode()
    def _capture(self, graph: bool) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._outputs = self._tower.encode(self._tiles)  # compiles kernels, which must not happen in a capture
        self._stream.synchronize()
        if graph:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._outputs = self._tower.encode(self._tiles)

    @torch.inference_mode()
    def _slot(self) -> _Slot:
        patches, scores = self._outputs
        return _Slot(
            staging=torch.empty(self._tiles.shape, dtype=torch.uint8, pin_memory=True),
            patches=torch.empty(patches.shape, dtype=patches.dtype, device=patches.device),
            scores=torch.empty_like(scores),
            begun=torch.cuda.Event(enable_timing=True),
            encoded=torch.cuda.Event(enable_timing=True),
            copied=torch.cuda.Event(),
        )

    def start(self, tiles: Sequence[np.ndarray]) -> RunningBatch:
        """Begin to encode and score at most ``size`` uint8 tiles ``[448, 448, 3]``."""
        slot = next(self._slots)
        for place, tile in zip(slot.staging, tiles, strict=False):
            place.copy_(torch.from_numpy(tile))  # what stands in the other places does not matter
        try:
            return self._launch(slot, len(tiles))
        except BaseException:
            self._stream.synchronize()  # what has been launched still reads the slot
            self._copies.synchronize()
            raise

    def _launch(self, slot: _Slot, count: int) -> RunningBatch:
        with torch.cuda.stream(self._stream):
            slot.begun.record()
            self._tiles.copy_(slot.staging, non_blocking=True)
            if self._graph is None:
                self._outputs = self._tower.encode(self._tiles)
            else:
                self._graph.replay()
            for kept, output in zip((slot.patches, slot.scores), self._outputs, strict=True):
                kept.copy_(output)  # the next batch overwrites the graph's outputs
            slot.encoded.record()
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.encoded)
            patches = [_to_pinned(slot.patches[index]) for index in range(count)]
            scores = _to_pinned(slot.scores[:count])
            slot.copied.record()
        return _CudaBatch(TileFeatures(patches, scores), slot)


def make_batches(tower: VisionTower, size: int, device: torch.device, graph: bool) -> CpuBatches | CudaBatches:
    """Batches of ``size`` tiles on ``device``, which is the tower's; ``graph`` matters on CUDA devices only."""
    return CudaBatches(tower, size, device, graph) if device.type == 'cuda' else CpuBatches(tower, size)


def _to_pinned(source: torch.Tensor) -> torch.Tensor:
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source, non_blocking=True)
