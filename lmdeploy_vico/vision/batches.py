"""Tiles in, patch tokens out, in batches of one fixed size: on a CUDA device as a graph, on a CPU as plain calls."""

import gc
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from lmdeploy_vico.vision.arena import ResultMemory
from lmdeploy_vico.vision.model.tower import VisionTower
from lmdeploy_vico.vision.tiling import TILE_SHAPE


@dataclass(frozen=True)
class TileFeatures:
    """ViT-level results of tiles, in host memory: all that routing and projecting need.

    Attributes:
        patches: ``[1024, D]`` for each tile, in the encoder's dtype; each with memory of its own.
        scores: float32 ``[n]``, the router's p[0] of each tile.
        digests: of the tiles' pixels, where they are routed; see :func:`~lmdeploy_vico.vision.tiling.tile_digests`.
    """

    patches: list[torch.Tensor]
    scores: torch.Tensor
    digests: Sequence[bytes] = ()


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


_capturing = threading.Lock()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What a capture needs of the rest of the process, besides the error mode ``thread_local``.

    In that mode, LMDeploy's too, other threads may allocate meanwhile: those of a pipeline's program, an engine in the
    same process, the one that pins host memory. Two things would still end it. PyTorch synchronises the device before
    each capture, which no stream of that device may be in: replicas capture one after the other. And what a garbage
    collection destroys, an event or a graph of something closed before, may call CUDA from the capturing thread.
    """
    with _capturing:
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@dataclass
class _Slot:
    """What one of two alternating batches needs of its own, since the next one starts before it is waited for.

    Attributes:
        staging: pinned, the tiles on their way to the device.
        patches, scores: on the device, until they have been copied.
        spare: pinned, for the patches of tiles to which no other pinned memory is lent.
        scores_read: pinned, what is read back of ``scores``.
        places: where the patches of each tile are being copied, None for ``spare``. Held from before the copies begin
            until the host knows that they have ended: memory that is lent must not come back while they may write it.
    """

    staging: torch.Tensor
    patches: torch.Tensor
    scores: torch.Tensor
    spare: torch.Tensor
    scores_read: torch.Tensor
    begun: torch.cuda.Event
    encoded: torch.cuda.Event
    copied: torch.cuda.Event
    places: list[torch.Tensor | None] = field(default_factory=list)

    def settle(self) -> list[torch.Tensor | None]:
        """Wait for the copies of the batch that had this slot last, and return where they went."""
        if self.places:
            self.copied.synchronize()
        places, self.places = self.places, []
        return places


class _CudaBatch(RunningBatch):
    def __init__(self, slot: _Slot) -> None:
        self._slot, self.seconds = slot, 0.0

    def wait(self) -> TileFeatures:
        slot = self._slot
        places = slot.settle()
        self.seconds = slot.begun.elapsed_time(slot.encoded) / 1000
        patches = [spare.clone() if place is None else place for place, spare in zip(places, slot.spare, strict=False)]
        return TileFeatures(patches, slot.scores_read[: len(places)].clone())


class CudaBatches:
    """Batches on a CUDA device, asynchronous; a batch must be waited for before the next but one is started.

    One stream computes, another takes results to pinned host memory meanwhile. Memory on the device, and pinned memory
    for a batch that goes in and one that comes out, is taken here, once.

    Attributes:
        memory: lends pinned memory that results stay in; without any, or when it has no more, they are copied from
            where they arrive into ordinary memory.

    Args:
        tower: on the device.
        size: tiles of every batch.
        device: the tower's.
        graph: replay one CUDA graph instead of launching kernel by kernel.
    """

    def __init__(self, tower: VisionTower, size: int, device: torch.device, graph: bool) -> None:
        self._tower, self._size, self._graph = tower, size, None
        self.memory: ResultMemory | None = None
        with torch.cuda.device(device):
            self._stream, self._copies = torch.cuda.Stream(), torch.cuda.Stream()
            self._tiles = torch.zeros(size, *TILE_SHAPE, dtype=torch.uint8, device=device)
            self._capture(graph)
            self._slots = itertools.cycle([self._slot(), self._slot()])
            torch.cuda.synchronize()

    @torch.inference_mode()
    def _capture(self, graph: bool) -> None:
        # A first run compiles kernels, which must not happen in a capture. One on the stream of the capture would also
        # leave cuBLAS a workspace for it outside the graph's own memory, and there it is freed, for the whole process,
        # when any LMDeploy engine in it is closed. (PyTorch has 32 streams and hands them out in turn: one that a stage
        # closed earlier has used may come back.)
        stream = torch.cuda.Stream() if graph else self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._outputs = self._tower.encode(self._tiles)
        stream.synchronize()
        if not graph:
            return
        self._graph = torch.cuda.CUDAGraph()
        try:
            with _undisturbed(), torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode='thread_local'):
                self._outputs = self._tower.encode(self._tiles)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f'{self._tiles.device}: the CUDA graph of the vision side could not be captured; --eager-mode starts '
                f'without graphs ({error}).'
            ) from error

    @torch.inference_mode()
    def _slot(self) -> _Slot:
        patches, scores = self._outputs
        return _Slot(
            staging=torch.empty(self._tiles.shape, dtype=torch.uint8, pin_memory=True),
            patches=torch.empty(patches.shape, dtype=patches.dtype, device=patches.device),
            scores=torch.empty_like(scores),
            spare=torch.empty(patches.shape, dtype=patches.dtype, pin_memory=True),
            scores_read=torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True),
            begun=torch.cuda.Event(enable_timing=True),
            encoded=torch.cuda.Event(enable_timing=True),
            copied=torch.cuda.Event(),
        )

    def start(self, tiles: Sequence[np.ndarray]) -> RunningBatch:
        """Begin to encode and score at most ``size`` uint8 tiles ``[448, 448, 3]``."""
        slot = next(self._slots)
        slot.settle()  # a batch that nobody has waited for
        places: list[torch.Tensor | None] = [None] * len(tiles)
        if self.memory is not None:
            places = self.memory.tiles(len(tiles))
        for place, tile in zip(slot.staging, tiles, strict=False):
            place.copy_(torch.from_numpy(tile))  # what stands in the other places does not matter
        try:
            self._launch(slot, places)
        except BaseException:
            self._stream.synchronize()  # what has been launched still reads and writes what the slot has
            self._copies.synchronize()
            slot.places = []
            raise
        return _CudaBatch(slot)

    def _launch(self, slot: _Slot, places: list[torch.Tensor | None]) -> None:
        slot.places = places
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
            for place, spare, patches in zip(places, slot.spare, slot.patches, strict=False):
                (spare if place is None else place).copy_(patches, non_blocking=True)
            slot.scores_read.copy_(slot.scores, non_blocking=True)
            slot.copied.record()


def make_batches(tower: VisionTower, size: int, device: torch.device, graph: bool) -> CpuBatches | CudaBatches:
    """Batches of ``size`` tiles on ``device``, which is the tower's; ``graph`` matters on CUDA devices only."""
    return CudaBatches(tower, size, device, graph) if device.type == 'cuda' else CpuBatches(tower, size)
