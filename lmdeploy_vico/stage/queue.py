"""The prompts that wait for their tiles to be encoded, in the order in which devices take them."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.tiles import Tile
from lmdeploy_vico.vision.encoder import RoutingGroup

ATTEMPTS = 2  # how often a tile is given to a device before its prompts fail


class StageBusyError(RuntimeError):
    """The stage accepts no tiles now: too many are waiting, or it has been closed. Another server may accept them."""


@dataclass(eq=False)
class PendingPrompt:
    """A prompt on its way through the stage.

    Attributes:
        images: the tiles of each image in the prompt's order; None until it is cut.
        groups: which images are routed together.
        size: how many tiles the images will be cut into.
        future: gets the result; a cancelled one drops the prompt wherever it is.
        arrived: ``time.perf_counter()`` when it came.
        begun: whether it has stopped waiting: a tile of it is on a device, or nothing of it has to be encoded.
        exhausted: whether no tile of it is left to be taken.
    """

    images: list[list[Tile] | None]
    groups: Sequence[RoutingGroup]
    size: int
    future: 'Future[Any]' = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)
    begun: bool = False
    exhausted: bool = False

    @property
    def tiles(self) -> list[Tile]:
        """The tiles of all images that have been cut."""
        return [tile for image in self.images if image is not None for tile in image]

    @property
    def encoded(self) -> bool:
        """Whether nothing is missing for routing and projecting."""
        return all(image is not None and all(tile.encoded for tile in image) for image in self.images)


@dataclass(eq=False)
class Admission:
    """A place for ``size`` tiles, held by a request whose images are not decoded yet.

    With it any number of prompts are accepted, since one request may bring a prompt for each of its choices.
    """

    size: int


class TileQueue:
    """Prompts in the order of their arrival, bounded in tiles. Safe to use from several threads.

    Args:
        capacity: tiles that may wait, None for any number. A prompt that alone has more is accepted when nothing else
            waits.
        devices: how many take tiles.
    """

    def __init__(self, capacity: int | None, devices: int = 1) -> None:
        self.capacity = capacity
        self._devices = set(range(devices))
        self._idle: set[int] = set()  # devices that wait for tiles
        self._prompts: list[PendingPrompt] = []
        self._admissions: list[Admission] = []
        self._changed = threading.Condition()
        self._refusal: str | None = None  # why nothing is accepted any more
        self._metrics = stage_metrics()

    def admit(self, size: int) -> Admission:
        """Hold a place for about ``size`` tiles until :meth:`release`; raises StageBusyError."""
        with self._changed:
            self._require_room(size)
            admission = Admission(size)
            self._admissions.append(admission)
            return admission

    def release(self, admission: Admission) -> None:
        """Give a place back."""
        with self._changed:
            self._admissions.remove(admission)

    def put(self, prompt: PendingPrompt, admission: Admission | None = None) -> None:
        """Queue a prompt whose images are still being cut; raises StageBusyError unless it was admitted."""
        with self._changed:
            if admission is None or self._refusal is not None:
                self._require_room(prompt.size)
            else:
                admission.size = 0  # from now on it is the prompt that counts
            self._prompts.append(prompt)

    def _require_room(self, size: int) -> None:
        if self._refusal is not None:
            raise StageBusyError(self._refusal)
        self._drop_finished()
        waiting = sum(prompt.size for prompt in self._prompts) + sum(place.size for place in self._admissions)
        if self.capacity is not None and waiting and waiting + size > self.capacity:
            raise StageBusyError(
                f'{waiting} tiles are waiting to be encoded, and {size} more would exceed the limit of '
                f'{self.capacity} (option max_queued_tiles). Try again later.'
            )

    def cut(self, prompt: PendingPrompt, index: int, tiles: list[Tile]) -> Exception | None:
        """Say that an image of a queued prompt has been cut.

        Returns:
            The error of a tile, shared with another prompt, that has been given up meanwhile; nothing is done then.
        """
        with self._changed:
            error = next((tile.error for tile in tiles if tile.error is not None), None)
            if error is None:
                prompt.images[index] = tiles
                self._changed.notify_all()
            return error

    def take(self, limit: int, wait: bool, device: int = 0) -> list[Tile]:
        """At most ``limit`` tiles for one batch, those of the oldest prompts first.

        Args:
            limit: of the batch.
            device: which of the devices asks. Tiles on which it has failed are left to the others.
            wait: for tiles, if there are none, or for prompts that :meth:`pop_encoded` returns. After :meth:`close`
                nothing is waited for or returned. A device that does not wait has a batch running; while others have
                none it gets no second one.
        """
        with self._changed:
            if not wait and self._idle & self._devices:
                return []
            while not (tiles := self._take(limit, device)) and wait and self.serves(device):
                if any(prompt.encoded for prompt in self._prompts):
                    break
                self._idle.add(device)
                try:
                    self._changed.wait()
                finally:
                    self._idle.remove(device)
            return tiles

    def _take(self, limit: int, device: int) -> list[Tile]:
        if not self.serves(device):
            return []
        self._drop_finished()
        taken: list[Tile] = []
        seen = []
        for prompt in self._prompts:
            if len(taken) == limit:
                break
            if prompt.exhausted:
                continue
            seen.append(prompt)
            left = [tile for tile in dict.fromkeys(prompt.tiles) if not tile.taken and tile not in taken]
            if its := [tile for tile in left if self._may_take(tile, device)][: limit - len(taken)]:
                taken += its
                self._begin(prompt)
        # Only now, so that none is lost should anything have failed.
        for tile in taken:
            tile.taken = True
        for prompt in seen:
            prompt.exhausted = None not in prompt.images and all(tile.taken for tile in prompt.tiles)
        return taken

    def _may_take(self, tile: Tile, device: int) -> bool:
        return device not in tile.failed_on or self._devices.issubset(tile.failed_on)

    def retire(self, device: int) -> bool:
        """Have a device take no more, unless it is the last; returns whether it was retired now."""
        with self._changed:
            if device not in self._devices or len(self._devices) == 1:
                return False
            self._devices.remove(device)
            self._changed.notify_all()
            return True

    def _begin(self, prompt: PendingPrompt) -> None:
        if not prompt.begun:
            prompt.begun = True
            self._metrics.queue_wait.observe(time.perf_counter() - prompt.arrived)

    def pop_encoded(self) -> list[PendingPrompt]:
        """The prompts of which every tile has been encoded; they are no longer waiting."""
        with self._changed:
            self._drop_finished()
            encoded = [prompt for prompt in self._prompts if prompt.encoded]
            for prompt in encoded:
                self._begin(prompt)
            self._prompts = [prompt for prompt in self._prompts if prompt not in encoded]
            return encoded

    def give_back(self, tiles: Sequence[Tile], error: Exception, device: int = 0) -> list[PendingPrompt]:
        """Have tiles on which a device failed taken once more, by another device if there is one.

        Returns:
            The prompts with a tile that has failed too often; they are no longer waiting.
        """
        with self._changed:
            for tile in tiles:
                if tile.encoded:
                    continue
                tile.failed_on.append(device)
                tile.taken = len(tile.failed_on) >= ATTEMPTS
                tile.error = error if tile.taken else None
            for prompt in self._prompts:
                prompt.exhausted = False
            failed = [prompt for prompt in self._prompts if any(tile.error for tile in prompt.tiles)]
            self._prompts = [prompt for prompt in self._prompts if prompt not in failed]
            self._changed.notify_all()
            return failed

    def _drop_finished(self) -> None:
        self._prompts = [prompt for prompt in self._prompts if not prompt.future.done()]

    def serves(self, device: int) -> bool:
        """Whether a device is to take tiles: not after :meth:`close`, or when it has been retired."""
        return self._refusal is None and device in self._devices

    def give_up(self) -> list[PendingPrompt]:
        """The prompts that are waiting, which they do no longer."""
        with self._changed:
            given_up, self._prompts = self._prompts, []
            return given_up

    def close(self, reason: str = 'The server is shutting down.') -> list[PendingPrompt]:
        """Take and accept no more, for a reason that clients are told; returns the prompts that are waiting."""
        with self._changed:
            self._refusal = reason
            self._changed.notify_all()
            return list(self._prompts)
