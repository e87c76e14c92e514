"""What the workers of a stage share: the waiting prompts and their tiles, and what success and failure do to them."""

import logging
from concurrent.futures import InvalidStateError
from contextlib import suppress

import torch

from lmdeploy_vico.log import about
from lmdeploy_vico.stage.errors import EncodingError, encoding_error, written_out
from lmdeploy_vico.stage.jobs import EncodedImage
from lmdeploy_vico.stage.memory import StageMemory
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.queue import PendingPrompt, TileQueue
from lmdeploy_vico.stage.tiles import Tile, TileCache
from lmdeploy_vico.stage.workers.protocol import DeviceEncoder, Features
from lmdeploy_vico.vision.batches import TileFeatures
from lmdeploy_vico.vision.projection import VisualTokens

logger = logging.getLogger(__name__)

FAILURES = 3  # batches in a row on which a device may fail before the others do its work, if there are any
BROKEN = 'The device that encodes images has failed; the server has to be restarted.'


class Work:
    """Hands tiles to workers and takes results or errors back. Safe to use from several threads.

    Attributes:
        memory: pinned memory for results, None where results lie in ordinary memory.

    Args:
        queue: the prompts that wait.
        cache: keeps tiles that have been encoded.
        output_dtype: of the embeddings.
    """

    def __init__(self, queue: TileQueue, cache: TileCache, output_dtype: torch.dtype) -> None:
        self.memory: StageMemory | None = None
        self._queue, self._cache, self._output_dtype = queue, cache, output_dtype
        self._metrics = stage_metrics()

    def take(self, device: int, limit: int, wait: bool) -> list[Tile]:
        """Return at most ``limit`` tiles for a batch of ``device``; see :meth:`TileQueue.take`."""
        return self._queue.take(limit, wait, device)

    def serves(self, device: int) -> bool:
        """Return whether ``device`` is to take tiles: not after the queue is closed or the device retired."""
        return self._queue.serves(device)

    def store(self, tiles: list[Tile], features: Features) -> None:
        """Give encoded tiles their features, and keep them for prompts to come."""
        for tile, patches, score in zip(tiles, features.patches, features.scores.tolist(), strict=True):
            tile.score = score
            tile.patches = patches  # from here on the tile counts as encoded
            self._free_pixels(tile)
            if self.memory is None or self.memory.may_keep(patches):
                self._cache.keep(tile)

    def _free_pixels(self, tile: Tile) -> None:
        """Let go of the pixels of an encoded tile."""
        tile.pixels = None

    def failed(self, device: int, tiles: list[Tile], error: Exception) -> None:
        """Have the tiles of a failed batch tried once more; fail the prompts whose tiles have no try left."""
        logger.error('encoding a batch of %d tiles failed: %s', len(tiles), written_out(error))
        for prompt in self._queue.give_back(tiles, error, device):
            fail(prompt, encoding_error(error))

    def give_up(self, error: Exception) -> None:
        """Fail all prompts that wait."""
        for prompt in self._queue.give_up():
            fail(prompt, encoding_error(error))

    def judge(self, device: int, encoder: DeviceEncoder, failures: int) -> None:
        """Decide whether a device that has just failed is used any longer.

        It is retired when it no longer answers, or has failed on FAILURES batches in a row, if another device remains.
        When the last one no longer answers, the stage refuses all prompts.

        Args:
            device: its number.
            encoder: of the device.
            failures: batches in a row on which it has failed.
        """
        if not self.serves(device):
            return
        usable = encoder.usable()
        if usable and failures < FAILURES:
            return
        if self._queue.retire(device):
            logger.error('%s has failed on %d batches in a row and is not used any more', encoder.device, failures)
        elif not usable:
            logger.critical('%s has failed for good and images cannot be encoded: restart the server', encoder.device)
            for prompt in self._queue.close(BROKEN):
                fail(prompt, EncodingError(BROKEN))
        elif failures == FAILURES:
            logger.error(
                '%s has failed on %d batches in a row, and there is no other device: '
                'if requests with images go on failing, restart the server',
                *(encoder.device, failures),
            )

    def finish_encoded(self, encoder: DeviceEncoder) -> bool:
        """Route and project the prompts whose tiles are all encoded; return whether every projection succeeded."""
        # A function of its own, so that its last prompt dies with it: an idle device thread holds no tiles.
        finished = [self._finish_one(encoder, prompt) for prompt in self._queue.pop_encoded()]
        return all(finished)

    def _finish_one(self, encoder: DeviceEncoder, prompt: PendingPrompt) -> bool:
        try:
            self._finish(encoder, prompt)
        except Exception as error:
            with about(prompt.request):
                logger.error('projecting the %d tiles of a prompt failed: %s', len(prompt.tiles), written_out(error))
            fail(prompt, encoding_error(error))
            return False
        return True

    def _visual_tokens(self, encoder: DeviceEncoder, prompt: PendingPrompt, counts: list[int]) -> list[VisualTokens]:
        """Route and project a prompt whose images have so many tiles."""
        tiles = prompt.tiles
        features = TileFeatures(
            [tile.patches for tile in tiles if isinstance(tile.patches, torch.Tensor)],
            torch.tensor([tile.score for tile in tiles]),
            [tile.digest for tile in tiles],
        )
        return encoder.visual_tokens(features, counts, prompt.groups, self._output_dtype)

    def _finish(self, encoder: DeviceEncoder, prompt: PendingPrompt) -> None:
        images = [image for image in prompt.images if image is not None]
        tokens = self._visual_tokens(encoder, prompt, [len(image) for image in images])
        encoded = [
            EncodedImage(one, [tile.digest for tile in image]) for one, image in zip(tokens, images, strict=True)
        ]
        # From here on the prompt cannot be cancelled, so that exactly the tiles that are handed on are counted. They
        # are counted before the result is set: whoever waits for it sees the new counts.
        if prompt.future.set_running_or_notify_cancel():
            for one in tokens:
                self._metrics.count_tiles(one.tile_tokens)
            prompt.future.set_result(encoded)


def fail(prompt: PendingPrompt, error: Exception) -> None:
    """Raise ``error`` from a prompt's future, unless it was cancelled or has failed already."""
    with suppress(InvalidStateError):
        prompt.future.set_exception(error)
