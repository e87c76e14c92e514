"""The prompts that wait for their tiles to be encoded, in the order in which devices take them."""

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_vico.log import request_id
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.tiles import Tile
from lmdeploy_vico.vision.routing import RoutingGroup

ATTEMPTS = 2  # how often a tile is given to a device before its prompts fail


class StageBusyError(RuntimeError):
    """The stage accepts no tiles now: too many are waiting, or it has been closed."""


@dataclass(eq=False)
class PendingPrompt:
    """A prompt on its way through the stage.

    Attributes:
        images: the tiles of each image in the prompt's order; None until it is cut.
        groups: which images are routed together, and by which compression.
        size: how many tiles the images are cut into.
        future: gets the result. Cancelling it drops the prompt.
        arrived: ``time.perf_counter()`` when it came.
        begun: whether it no longer waits: a device has taken a tile of it, or all its tiles were encoded already.
        exhausted: whether all its tiles have been taken.
        request: the id of the request that it is of.
    """

    images: list[list[Tile] | None]
    groups: Sequence[RoutingGroup]
    size: int
    future: 'Future[Any]' = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)
    begun: bool = False
    exhausted: bool = False
    request: str = field(default_factory=request_id.get)

    @property
    def tiles(self) -> list[Tile]:
        """The tiles of all images that have been cut."""
        return [tile for image in self.images if image is not None for tile in image]

    @property
    def encoded(self) -> bool:
        """Whether all images are cut and all tiles encoded: the prompt can be routed and projected."""
        return all(image is not None and all(tile.encoded for tile in image) for image in self.images)


@dataclass(eq=False)
class Admission:
    """A place for ``size`` tiles, held by a request whose images are not decoded yet.

    Every prompt submitted with it is accepted: a request for several choices brings a prompt for each.
    """

    size: int


class TileQueue:
    """Prompts in the order of their arrival, bounded in tiles. Safe to use from several threads.

    Args:
        capacity: how many tiles may wait, None for any number. A prompt with more tiles than that is accepted when
            nothing else waits.
        devices: how many take tiles from the beginning; they are numbered from 0.
    """

    def __init__(self, capacity: int | None, devices: int = 1) -> None:
        self.capacity = capacity
        self._devices = set(range(devices))
        self._numbers = itertools.count(devices)  # of devices that come later
        self._absence: str | None = None  # why nothing is accepted until a device comes
        self._idle: set[int] = set()  # devices that wait for tiles
        self._prompts: list[PendingPrompt] = []
        self._admissions: list[Admission] = []
        self._changed = threading.Condition()
        self._refusal: str | None = None  # why nothing is accepted any more
        self._metrics = stage_metrics()

    def admit(self, size: int) -> Admission:
        """Hold a place for about ``size`` tiles until :meth:`release`.

        Raises:
            StageBusyError: too many tiles are waiting, or the queue is closed.
        """
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
        """Queue a prompt whose images are still to be cut.

        Raises:
            StageBusyError: too many tiles are waiting and it has no admission, or the queue is closed.
        """
        with self._changed:
            if admission is None or self._refusal is not None or self._absence is not None:
                self._require_room(prompt.size)
            else:
                admission.size = 0  # from now on the prompt is counted instead
            self._prompts.append(prompt)

    def _require_room(self, size: int) -> None:
        if (refusal := self._refusal or self._absence) is not None:
            raise StageBusyError(refusal)
        self._drop_finished()
        waiting = sum(prompt.size for prompt in self._prompts) + sum(place.size for place in self._admissions)
        if self.capacity is not None and waiting and waiting + size > self.capacity:
            raise StageBusyError(
                f'{waiting} tiles are waiting to be encoded, and {size} more would exceed the limit of '
                f'{self.capacity} (option max_queued_tiles). Try again later.'
            )

    def cut(self, prompt: PendingPrompt, index: int, tiles: list[Tile]) -> Exception | None:
        """Give a queued prompt the tiles of an image that has been cut.

        Returns:
            None; or the error of one of the tiles, if that was given up for another prompt meanwhile. The prompt does
            not get the tiles then.
        """
        with self._changed:
            error = next((tile.error for tile in tiles if tile.error is not None), None)
            if error is None:
                prompt.images[index] = tiles
                self._changed.notify_all()
            return error

    def take(self, limit: int, wait: bool, device: int = 0) -> list[Tile]:
        """Take at most ``limit`` tiles for one batch, those of the oldest prompts first.

        A device that has a batch running gets no tiles while another device has none. After :meth:`close` no device
        gets any.

        Args:
            limit: the most tiles of the batch.
            wait: whether to block until there are tiles, or a prompt for :meth:`pop_encoded`, or the queue is closed.
                A device with a batch running does not wait.
            device: the number of the device that asks. It gets no tiles on which it has failed, while other devices
                have not.
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
        # Marked last: if anything above raises, no tile is lost.
        for tile in taken:
            tile.taken = True
        for prompt in seen:
            prompt.exhausted = None not in prompt.images and all(tile.taken for tile in prompt.tiles)
        return taken

    def _may_take(self, tile: Tile, device: int) -> bool:
        return device not in tile.failed_on or self._devices.issubset(tile.failed_on)

    def retire(self, device: int) -> bool:
        """Give a device no more tiles, unless it is the last one; return whether this call retired it."""
        with self._changed:
            if device not in self._devices or len(self._devices) == 1:
                return False
            self._devices.remove(device)
            self._changed.notify_all()
            return True

    def join(self) -> int:
        """Let one more device take tiles; return its number."""
        with self._changed:
            number = next(self._numbers)
            self._devices.add(number)
            self._absence = None
            return number

    def leave(self, device: int) -> None:
        """Give a device no more tiles, also if it is the last one: prompts wait for another to join then."""
        with self._changed:
            self._devices.discard(device)
            self._changed.notify_all()

    def suspend(self, reason: str) -> list[PendingPrompt]:
        """Accept no prompt until a device joins; does nothing if there is one.

        Args:
            reason: what clients are told.

        Returns:
            The prompts that wait; they have left the queue.
        """
        with self._changed:
            if self._devices:
                return []
            self._absence = reason
            waiting, self._prompts = self._prompts, []
            return waiting

    def put_back(self, tiles: Sequence[Tile]) -> None:
        """Let tiles that a device has taken be taken once more, which counts as no failure: the device is gone."""
        with self._changed:
            for tile in tiles:
                tile.taken = tile.encoded
            for prompt in self._prompts:
                prompt.exhausted = False
            self._changed.notify_all()

    def return_encoded(self, prompt: PendingPrompt) -> str | None:
        """Take a prompt from :meth:`pop_encoded` back, for a device that comes.

        Returns:
            None; or why the prompt has to fail, if nothing is accepted.
        """
        with self._changed:
            if (refusal := self._refusal or self._absence) is None:
                self._prompts.insert(0, prompt)
                self._changed.notify_all()
            return refusal

    def _begin(self, prompt: PendingPrompt) -> None:
        if not prompt.begun:
            prompt.begun = True
            self._metrics.queue_wait.observe(time.perf_counter() - prompt.arrived)

    def pop_encoded(self) -> list[PendingPrompt]:
        """Remove the prompts whose tiles are all encoded from the queue, and return them."""
        with self._changed:
            self._drop_finished()
            encoded = [prompt for prompt in self._prompts if prompt.encoded]
            for prompt in encoded:
                self._begin(prompt)
            self._prompts = [prompt for prompt in self._prompts if prompt not in encoded]
            return encoded

    def give_back(self, tiles: Sequence[Tile], error: Exception, device: int = 0) -> list[PendingPrompt]:
        """Give back tiles on which a device failed. They are tried again, by another device if there is one.

        Returns:
            The prompts with a tile that has now failed ATTEMPTS times; they have left the queue.
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
        """Return whether a device is to take tiles: not after :meth:`close`, nor when it has been retired."""
        return self._refusal is None and device in self._devices

    def give_up(self) -> list[PendingPrompt]:
        """Remove all prompts from the queue, and return them."""
        with self._changed:
            given_up, self._prompts = self._prompts, []
            return given_up

    def close(self, reason: str = 'The server is shutting down.') -> list[PendingPrompt]:
        """Accept no prompt and give no tile any more.

        Args:
            reason: what clients are told.

        Returns:
            The prompts that are waiting; they stay in the queue.
        """
        with self._changed:
            self._refusal = reason
            self._changed.notify_all()
            return list(self._prompts)
