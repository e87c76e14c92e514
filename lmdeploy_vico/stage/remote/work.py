"""What the workers of encoders elsewhere share: as for threads, but features stay there and may be lost."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.stage.errors import EncoderGoneError
from lmdeploy_vico.stage.queue import PendingPrompt, StageBusyError, TileQueue
from lmdeploy_vico.stage.remote.encoder import Encoders, RemoteEncoder
from lmdeploy_vico.stage.remote.projecting import project
from lmdeploy_vico.stage.tiles import Tile, TileCache
from lmdeploy_vico.stage.work import Work, fail
from lmdeploy_vico.stage.workers.protocol import DeviceBatch, DeviceEncoder
from lmdeploy_vico.stage.workers.thread import DeviceThread
from lmdeploy_vico.vision.projection import VisualTokens, split_by_image
from lmdeploy_vico.vision.routing import route_prompt

logger = logging.getLogger(__name__)

FINISHING = 8  # prompts that are projected at the same time; the wire and the devices are shared by all


class RemoteWork(Work):
    """Hands tiles to encoders elsewhere, and has prompts projected by those that keep their features.

    A prompt is routed here, by its scores. A thread of a few projects it, so that no encoder waits for tokens to cross
    the wire before it gets its next batch.

    Attributes:
        encoders: those that are there.

    Args:
        queue: the prompts that wait.
        cache: remembers where the features of tiles are.
        output_dtype: of the embeddings.
        config: the checkpoint's.
    """

    def __init__(self, queue: TileQueue, cache: TileCache, output_dtype: torch.dtype, config: VicoConfig) -> None:
        super().__init__(queue, cache, output_dtype)
        self.encoders = Encoders()
        self._config = config
        self._finishing = ThreadPoolExecutor(FINISHING, thread_name_prefix='vico-project')
        self._room = threading.Semaphore(FINISHING)  # else finished prompts would pile up, uncounted by any limit

    def join(self, encoder: RemoteEncoder) -> int:
        """Use one more encoder; return its number in the queue."""
        self.encoders.add(encoder)
        return self._queue.join()

    def leave(self, device: int) -> None:
        """Give an encoder no more tiles."""
        self._queue.leave(device)

    def suspend(self, reason: str) -> None:
        """Fail all prompts that wait, and refuse others until an encoder comes; nothing is done if one is there."""
        for prompt in self._queue.suspend(reason):
            fail(prompt, StageBusyError(reason))

    def close(self) -> None:
        """Wait for the prompts that are being projected."""
        self._finishing.shutdown()

    def failed(self, device: int, tiles: list[Tile], error: Exception) -> None:
        """Have the tiles of a failed batch tried once more; an encoder that is gone has not failed on them."""
        if isinstance(error, EncoderGoneError):
            logger.warning('%d tiles are given to another encoder: %s', len(tiles), error)
            self._queue.put_back(tiles)
        else:
            super().failed(device, tiles, error)

    def judge(self, device: int, encoder: DeviceEncoder, failures: int) -> None:
        """Decide whether an encoder that has just failed is used any longer: not one that is gone."""
        if encoder.usable():
            super().judge(device, encoder, failures)
        else:
            self._queue.leave(device)

    def finish_encoded(self, encoder: DeviceEncoder) -> bool:
        """Have the prompts whose tiles are all encoded routed and projected; return True, as others do that."""
        for prompt in self._queue.pop_encoded():
            self._room.acquire()
            self._finishing.submit(self._finish_and_release, encoder, prompt)
        return True

    def _finish_and_release(self, encoder: DeviceEncoder, prompt: PendingPrompt) -> None:
        try:
            self._finish_one(encoder, prompt)
        finally:
            self._room.release()

    def _finish_one(self, encoder: DeviceEncoder, prompt: PendingPrompt) -> bool:
        if prompt.future.cancelled():
            return True
        return super()._finish_one(encoder, prompt)

    def _finish(self, encoder: DeviceEncoder, prompt: PendingPrompt) -> None:
        try:
            super()._finish(encoder, prompt)
        except EncoderGoneError:
            # It waits, encoded as it is, for an encoder that comes.
            if refusal := self._queue.return_encoded(prompt):
                fail(prompt, StageBusyError(refusal))

    def _visual_tokens(self, encoder: DeviceEncoder, prompt: PendingPrompt, counts: list[int]) -> list[VisualTokens]:
        config, tiles = self._config, prompt.tiles
        scores = torch.tensor([tile.score for tile in tiles])
        digests = [tile.digest for tile in tiles]
        thresholds = config.relative_threshold, config.absolute_threshold
        compressed = route_prompt(scores, digests, counts, prompt.groups, *thresholds)
        rows = project(self.encoders, tiles, compressed, self._output_dtype, config.llm_hidden_size)
        return split_by_image(rows, scores, counts, compressed)

    def _free_pixels(self, tile: Tile) -> None:
        """Keep them: the features may be lost."""


class Lane(DeviceThread):
    """The thread that feeds one encoder elsewhere, until that is gone.

    Attributes:
        device: its number in the queue.
        encoder: that it feeds.
    """

    def __init__(self, device: int, encoder: RemoteEncoder, work: RemoteWork) -> None:
        super().__init__(device, encoder, work)
        self.device, self.encoder = device, encoder

    def _send(self, tiles: list[Tile]) -> DeviceBatch:
        return self.encoder.encode(tiles)
