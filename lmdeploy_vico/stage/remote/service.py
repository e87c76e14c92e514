"""What runs beside a device elsewhere: it encodes, keeps features, and projects them when a server has routed them.

Of a tile only its pixels, its score and its visual tokens ever cross the wire. The features stay here, in a cache of
this process, under the tile's digest, which contains the salt of the request that showed it. A server that asks for
tokens of a tile whose features are not here any more is told so, and sends the pixels once more.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lmdeploy_vico.stage.memory import StageMemory
from lmdeploy_vico.stage.remote.channel import Hello
from lmdeploy_vico.stage.tiles import Tile, TileCache
from lmdeploy_vico.stage.workers.protocol import DeviceBatch, DeviceEncoder, Features
from lmdeploy_vico.vision.batches import TileFeatures
from lmdeploy_vico.vision.routing import RoutingGroup

STARTED = 2  # batches on the device: one is started before the last has been waited for


@dataclass(frozen=True)
class Encoded:
    """What is answered to a batch: float32 scores of its tiles, and the seconds that the device took, 0 for none."""

    scores: list[float]
    seconds: float


@dataclass(frozen=True)
class Projected:
    """Visual tokens of tiles.

    Attributes:
        lost: the places, in the list of the call, of tiles whose features are not here.
        rows: the tokens of all other tiles, one tile after another, as bytes: uint8 ``[rows, H * itemsize]``; numpy,
            whose arrays travel without being pickled, knows no bfloat16.
    """

    lost: list[int]
    rows: np.ndarray


class Device:
    """Lets several threads use one encoder, which belongs to one thread.

    Batches of several servers alternate in the order in which they come, two of them on the way at a time.

    Args:
        encoder: of the device.
    """

    def __init__(self, encoder: DeviceEncoder) -> None:
        self._encoder = encoder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix='vico-encoder', initializer=encoder.enter_thread)
        self._starting = threading.Lock()
        self._changed = threading.Condition()
        self._started: deque[DeviceBatch] = deque()

    def encode(self, tiles: Sequence[np.ndarray]) -> tuple[Features, float]:
        """Encode at most a batch of tiles; return their features, and the seconds that the device took."""
        with self._starting:
            with self._changed:
                self._changed.wait_for(lambda: len(self._started) < STARTED)
            batch = self._thread.submit(self._encoder.start, tiles).result()
            with self._changed:
                self._started.append(batch)
        with self._changed:
            self._changed.wait_for(lambda: self._started[0] is batch)  # waited for in the order of their start
        try:
            return batch.wait(), batch.seconds
        finally:
            with self._changed:
                self._started.popleft()
                self._changed.notify_all()

    def project(self, patches: list[torch.Tensor], compressed: Sequence[bool], dtype: torch.dtype) -> torch.Tensor:
        """Project tiles that have been routed; return their tokens ``[rows, H]``, one tile after another."""
        features = TileFeatures(patches, torch.zeros(len(patches)))
        kinds = {kind: [index for index, one in enumerate(compressed) if one is kind] for kind in (False, True)}
        groups: list[RoutingGroup] = [(kinds[False], 'none'), (kinds[True], 'all')]
        counts = [1] * len(patches)
        images = self._thread.submit(self._encoder.visual_tokens, features, counts, groups, dtype).result()
        return torch.cat([image.embeddings for image in images])


class EncoderService:
    """The encoder of one device as servers call it. Its methods may be called from several threads.

    Args:
        encoder: of the device.
        hello: what it says of itself.
        cache_bytes: host memory for features. Those of tiles that are not projected yet lie there too; where it is too
            small they are encoded again.
        broken: called when the device has failed for good: ends this process, so that another takes its place.
    """

    def __init__(
        self, encoder: DeviceEncoder, hello: Hello, cache_bytes: int, broken: Callable[[], None] = lambda: None
    ) -> None:
        self._encoder, self._hello, self._broken = encoder, hello, broken
        self._device = Device(encoder)
        self._cache = TileCache(cache_bytes)
        self._memory: StageMemory | None = None
        if encoder.copies_results:
            self._memory = StageMemory([encoder], encoder.dtype, self._cache)
            encoder.use_memory(self._memory)

    def hello(self) -> Hello:
        """Return what the encoder says of itself; that it answers shows that it lives."""
        return self._hello

    def encode(self, digests: Sequence[bytes], tiles: Sequence[np.ndarray]) -> Encoded:
        """Encode and score at most ``tile_batch`` tiles, and keep their features; those that are kept are not encoded.

        Args:
            digests: of each tile.
            tiles: uint8 ``[448, 448, 3]`` each.
        """
        found, seconds = self._features(digests, tiles)
        return Encoded([tile.score for tile in found], seconds)

    def project(self, digests: Sequence[bytes], compressed: Sequence[bool], dtype: str) -> Projected:
        """Return the visual tokens of tiles that have been encoded here.

        Args:
            digests: of each tile.
            compressed: whether each gets 64 tokens.
            dtype: of the tokens, as torch names it.
        """
        found = self._cache.get(digests, [None] * len(digests))
        return self._project(found, compressed, dtype)

    def encode_and_project(
        self, digests: Sequence[bytes], tiles: Sequence[np.ndarray], compressed: Sequence[bool], dtype: str
    ) -> Projected:
        """Return the visual tokens of at most ``tile_batch`` tiles that have been routed already; none is lost."""
        found, _ = self._features(digests, tiles)
        return self._project(found, compressed, dtype)

    def _features(self, digests: Sequence[bytes], tiles: Sequence[np.ndarray]) -> tuple[list[Tile], float]:
        found = self._cache.get(digests, [None] * len(digests))
        pixels = {tile: one for tile, one in zip(found, tiles, strict=True) if not tile.encoded}
        if not pixels:
            return found, 0.0
        try:
            features, seconds = self._device.encode(list(pixels.values()))
        except Exception:
            self._check()
            raise
        for tile, patches, score in zip(pixels, features.patches, features.scores.tolist(), strict=True):
            tile.score = score
            tile.patches = patches
            if self._memory is None or self._memory.may_keep(patches):
                self._cache.keep(tile)
        return found, seconds

    def _project(self, tiles: Sequence[Tile], compressed: Sequence[bool], dtype: str) -> Projected:
        features = [tile.patches for tile in tiles]  # read once: another call may be encoding the same tile
        here = [index for index, one in enumerate(features) if one is not None]
        lost = [index for index, one in enumerate(features) if one is None]
        if not here:
            return Projected(lost, np.empty((0, 0), np.uint8))
        patches = [one for one in features if isinstance(one, torch.Tensor)]
        try:
            tokens = self._device.project(patches, [compressed[index] for index in here], getattr(torch, dtype))
        except Exception:
            self._check()
            raise
        return Projected(lost, tokens.view(torch.uint8).numpy())

    def _check(self) -> None:
        if not self._encoder.usable():
            self._broken()
