"""The tiles of all waiting prompts, in the order in which a device takes them."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmdeploy_vico.vision.encoder import TileFeatures
from lmdeploy_vico.vision.routing import Compression


class StageBusyError(RuntimeError):
    """More tiles are waiting than the stage accepts; the request can be sent again later."""


@dataclass
class PendingImage:
    """One image of a prompt: its tiles, once they are cut, and how many of them have been handed to the device."""

    tiles: np.ndarray | None = None
    digests: Sequence[bytes] = ()
    taken: int = 0
    features: list[TileFeatures] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """Tiles that are cut and not yet handed to the device."""
        return 0 if self.tiles is None else len(self.tiles) - self.taken

    @property
    def encoded(self) -> bool:
        """Whether the features of all tiles are there."""
        return self.tiles is not None and sum(len(part.scores) for part in self.features) == len(self.tiles)


@dataclass(eq=False)
class PendingPrompt:
    """A prompt on its way through the stage.

    Attributes:
        images: in the prompt's order.
        compression: for the prompt, and for each image that has a value of its own.
        tiles: how many the images will be cut into.
        future: gets the result; a cancelled one drops the prompt wherever it is.
        arrived: ``time.perf_counter()`` when it came.
        begun: whether a tile of it has been on the device.
    """

    images: list[PendingImage]
    compression: Compression
    image_compression: list[Compression | None]
    tiles: int
    future: 'Future[Any]' = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)
    begun: bool = False


@dataclass(frozen=True)
class Part:
    """Consecutive tiles of one image, for one device batch."""

    prompt: PendingPrompt
    image: PendingImage
    tiles: np.ndarray


class TileQueue:
    """Prompts in the order of their arrival, bounded in tiles. Safe to use from several threads.

    Args:
        capacity: tiles that may wait. A prompt that alone has more is accepted when nothing else waits.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._prompts: list[PendingPrompt] = []
        self._changed = threading.Condition()
        self._closed = False

    def put(self, prompt: PendingPrompt) -> None:
        """Queue a prompt whose images are still being cut; raises StageBusyError."""
        with self._changed:
            self._drop_finished()
            waiting = sum(other.tiles for other in self._prompts)
            if waiting and waiting + prompt.tiles > self.capacity:
                raise StageBusyError(
                    f'{waiting} tiles are waiting to be encoded, and {prompt.tiles} more would exceed the limit of '
                    f'{self.capacity} (option max_queued_tiles). Try again later.'
                )
            self._prompts.append(prompt)

    def cut(self, image: PendingImage, tiles: np.ndarray, digests: Sequence[bytes]) -> None:
        """Say that an image of a queued prompt has been cut."""
        with self._changed:
            image.tiles, image.digests = tiles, digests
            self._changed.notify_all()

    def take(self, limit: int, wait: bool) -> list[Part]:
        """At most ``limit`` tiles for one batch, those of the oldest prompts first.

        Args:
            limit: of the batch.
            wait: for tiles, if there are none. Returns nothing only without it, or after :meth:`close`.
        """
        with self._changed:
            while not (parts := self._take(limit)) and wait and not self._closed:
                self._changed.wait()
            return [] if self._closed else parts

    def _take(self, limit: int) -> list[Part]:
        self._drop_finished()
        parts = []
        for prompt in self._prompts:
            for image in prompt.images:
                count = min(limit, image.waiting)
                if count:
                    assert image.tiles is not None
                    parts.append(Part(prompt, image, image.tiles[image.taken : image.taken + count]))
                    image.taken += count
                    limit -= count
        return parts

    def _drop_finished(self) -> None:
        self._prompts = [prompt for prompt in self._prompts if not prompt.future.done()]

    def close(self) -> list[PendingPrompt]:
        """Take no more; returns the prompts that were waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._prompts
