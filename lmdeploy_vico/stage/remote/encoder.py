"""An encoder elsewhere as a stage's worker sees it, and the set of those that a server uses."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.stage.errors import EncoderGoneError
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.remote.channel import Answer, Channel, Hello
from lmdeploy_vico.stage.remote.service import Encoded, Projected
from lmdeploy_vico.stage.tiles import Elsewhere, Tile
from lmdeploy_vico.vision.arena import ResultMemory
from lmdeploy_vico.vision.batches import RunningBatch

LOOK = 0.5  # seconds after which a thread that waits for an answer looks whether the encoder has been given up


@dataclass(frozen=True)
class Places:
    """Scores of tiles, float32 ``[n]``, whose features stay elsewhere; ``patches`` says where."""

    patches: list[Elsewhere]
    scores: torch.Tensor


class RemoteEncoder:
    """Sends batches of tiles to an encoder: a :class:`~lmdeploy_vico.stage.workers.protocol.DeviceEncoder`.

    Safe to use from several threads.

    Attributes:
        gone: whether it is given up: it has ended, or no longer answers. It never comes back; what is started in its
            place is another RemoteEncoder.
        incarnation: of the encoder.

    Args:
        channel: to the encoder.
        hello: what it says of itself.
        config: the checkpoint's.
    """

    copies_results = False

    def __init__(self, channel: Channel, hello: Hello, config: VicoConfig) -> None:
        self.config, self.gone = config, False
        self.device = channel.name
        self.dtype: torch.dtype = getattr(torch, hello['dtype'])
        self.tile_batch: int = hello['tile_batch']
        self.incarnation: str = hello['incarnation']
        self.hello = hello
        self._channel = channel
        self._metrics = stage_metrics()

    def enter_thread(self) -> None:
        """Nothing has to be done: the encoder has a thread of its own."""

    def use_memory(self, memory: ResultMemory | None) -> None:
        """Nothing is copied from a device of this process."""
        assert memory is None

    def usable(self) -> bool:
        """Return whether it has not been given up."""
        return not self.gone

    def start(self, tiles: Sequence[np.ndarray]) -> RunningBatch:
        """Refuse: an encoder elsewhere needs the digests of tiles as well; see :meth:`encode`."""
        raise NotImplementedError

    def visual_tokens(self, features: Any, counts: Any, groups: Any, dtype: Any) -> Any:
        """Refuse: the features of a prompt may lie with several encoders; see :mod:`.projecting`."""
        raise NotImplementedError

    def encode(self, tiles: Sequence[Tile]) -> 'SentBatch':
        """Send at most ``tile_batch`` tiles away to be encoded and scored."""
        pixels = pixels_of(tiles)
        answer = self._call('encode', [tile.digest for tile in tiles], pixels)
        self._count_sent(pixels)
        return SentBatch(self, len(tiles), answer)

    def project(self, tiles: Sequence[Tile], compressed: Sequence[bool], dtype: torch.dtype) -> Answer:
        """Ask for the visual tokens of tiles that it has encoded; :meth:`received` gets them."""
        return self._call('project', [tile.digest for tile in tiles], list(compressed), _name(dtype))

    def encode_and_project(self, tiles: Sequence[Tile], compressed: Sequence[bool], dtype: torch.dtype) -> Answer:
        """Send at most ``tile_batch`` tiles once more, to be encoded and projected; :meth:`received` gets the tokens.

        They take no detour through the encoder's cache, whose memory may be too small for a prompt's features.
        """
        pixels = pixels_of(tiles)
        digests = [tile.digest for tile in tiles]
        answer = self._call('encode_and_project', digests, pixels, list(compressed), _name(dtype))
        self._count_sent(pixels)
        return answer

    def received(self, answer: Answer) -> Projected:
        """Wait for visual tokens.

        Raises:
            EncoderGoneError: the encoder has ended, or is given up meanwhile.
        """
        projected: Projected = self.result(answer)
        self._metrics.remote_bytes.labels('received').inc(projected.rows.nbytes)
        return projected

    def result(self, answer: Answer) -> Any:
        """Wait for an answer; raises EncoderGoneError, or what the call raised."""
        try:
            while not answer.ready(LOOK):
                if self.gone:
                    raise EncoderGoneError(f'{self.device} does not answer.')
            return answer.result()
        except EncoderGoneError:
            self.gone = True
            raise

    def _call(self, method: str, *arguments: Any) -> Answer:
        if self.gone:
            raise EncoderGoneError(f'{self.device} has ended, or does not answer.')
        return self._channel.call(method, *arguments)

    def _count_sent(self, pixels: Sequence[np.ndarray]) -> None:
        self._metrics.remote_bytes.labels('sent').inc(sum(tile.nbytes for tile in pixels))


class SentBatch:
    """A batch on its way: a :class:`~lmdeploy_vico.stage.workers.protocol.DeviceBatch`."""

    def __init__(self, encoder: RemoteEncoder, tiles: int, answer: Answer) -> None:
        self._encoder, self._tiles, self._answer = encoder, tiles, answer
        self.seconds = 0.0

    def wait(self) -> Places:
        """Return the scores; raises EncoderGoneError, or what the encoder raised."""
        encoded: Encoded = self._encoder.result(self._answer)
        self.seconds = encoded.seconds
        places = [Elsewhere(self._encoder.incarnation) for _ in range(self._tiles)]
        return Places(places, torch.tensor(encoded.scores))


class Encoders:
    """Those that a server uses now, by incarnation. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._encoders: dict[str, RemoteEncoder] = {}
        self._turn = itertools.count()

    def add(self, encoder: RemoteEncoder) -> None:
        """Use one more."""
        with self._lock:
            self._encoders[encoder.incarnation] = encoder

    def get(self, incarnation: str) -> RemoteEncoder | None:
        """The encoder of this incarnation, if it is not gone."""
        with self._lock:
            self._drop_gone()
            return self._encoders.get(incarnation)

    def any(self) -> RemoteEncoder:
        """One of them, each in turn; raises EncoderGoneError if there is none."""
        with self._lock:
            self._drop_gone()
            if not self._encoders:
                raise EncoderGoneError('No encoder is there.')
            return list(self._encoders.values())[next(self._turn) % len(self._encoders)]

    def all(self) -> list[RemoteEncoder]:
        """All of them that are not gone, in the order in which they came."""
        with self._lock:
            self._drop_gone()
            return list(self._encoders.values())

    def _drop_gone(self) -> None:
        self._encoders = {key: one for key, one in self._encoders.items() if not one.gone}


def pixels_of(tiles: Sequence[Tile]) -> list[np.ndarray]:
    """The pixels of tiles, which they keep while their features are elsewhere."""
    pixels = [tile.pixels for tile in tiles if tile.pixels is not None]
    assert len(pixels) == len(tiles)
    return pixels


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
