"""A worker that is a thread of this process."""

import logging
import threading
from concurrent.futures import Future
from dataclasses import dataclass

from lmdeploy_vico.stage.errors import DeviceStartError
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.tiles import Tile
from lmdeploy_vico.stage.work import FAILURES, Work
from lmdeploy_vico.stage.workers.protocol import DeviceBatch, DeviceEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Running:
    """A batch on the device, and its tiles."""

    tiles: list[Tile]
    batch: DeviceBatch


class DeviceThread:
    """The thread that owns one device: a :class:`~lmdeploy_vico.stage.workers.protocol.Worker`.

    It takes tiles, starts the next batch before it waits for the last, and finishes prompts whose tiles are all
    encoded. No error ends it: the tiles that it had are tried again, and it goes on.

    Args:
        device: its number among the devices of the stage.
        encoder: of the device.
        work: the stage's.
    """

    def __init__(self, device: int, encoder: DeviceEncoder, work: Work) -> None:
        self._device, self._encoder, self._work = device, encoder, work
        self._metrics = stage_metrics()
        self._batches: list[list[Tile]] = []  # taken, and neither encoded nor given back yet
        self._running: _Running | None = None
        self._failures = 0  # batches in a row
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f'vico-device-{device}', daemon=True)

    def start(self) -> None:
        """Start the thread, which gets its device ready and then takes tiles."""
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Return when the device is ready.

        Raises:
            DeviceStartError: the device cannot be used; the thread has ended or is about to.
        """
        self._ready.result()

    def join(self) -> None:
        """Return when the thread has ended."""
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._encoder.enter_thread()
            self._ready.set_result(None)
        except Exception as error:
            self._ready.set_exception(DeviceStartError(self._encoder.device, error))
            return
        while self._running is not None or self._work.serves(self._device):
            try:
                self._turn()
            except Exception as error:
                self._recover(error)

    def _turn(self) -> None:
        """Start a batch of what waits, end the batch before it, and finish the prompts that are then complete."""
        tiles = self._work.take(self._device, self._encoder.tile_batch, wait=self._running is None)
        if tiles:
            self._batches.append(tiles)
        started = self._start(tiles) if tiles else None
        failed = bool(tiles) and started is None
        self._failures += failed
        if self._running is not None:
            ended = self._end(self._running)
            self._failures = 0 if ended else self._failures + 1
            failed = failed or not ended
        self._running = started
        if not self._work.finish_encoded(self._encoder) or failed:
            self._work.judge(self._device, self._encoder, self._failures)

    def _start(self, tiles: list[Tile]) -> _Running | None:
        """Start a batch; if that fails, give its tiles back and return None."""
        try:
            self._metrics.tiles_per_batch.observe(len(tiles))
            return _Running(tiles, self._send(tiles))
        except Exception as error:
            self._give_back(tiles, error)
            return None

    def _send(self, tiles: list[Tile]) -> DeviceBatch:
        """Have the encoder begin with a batch."""
        return self._encoder.start([tile.pixels for tile in tiles if tile.pixels is not None])

    def _end(self, running: _Running) -> bool:
        """Wait for a batch and store its results; if that fails, give its tiles back. Return whether it succeeded."""
        try:
            self._work.store(running.tiles, running.batch.wait())
            self._metrics.model_forward.observe(running.batch.seconds)
        except Exception as error:
            self._give_back(running.tiles, error)
            return False
        self._batches.remove(running.tiles)
        return True

    def _give_back(self, tiles: list[Tile], error: Exception) -> None:
        self._work.failed(self._device, tiles, error)
        self._batches.remove(tiles)

    def _recover(self, error: Exception) -> None:
        """Go on after an error that nothing else has caught, as a new thread would."""
        logger.error('the thread of %s goes on after an error', self._encoder.device, exc_info=error)
        self._running = None
        self._failures += 1
        for tiles in list(self._batches):
            self._give_back(tiles, error)
        if self._failures >= FAILURES:
            self._work.give_up(error)  # a waiting prompt may be what causes the error each time
        self._work.judge(self._device, self._encoder, self._failures)
