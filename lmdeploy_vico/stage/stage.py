"""VisionStage: prepares the images of many requests in parallel and encodes their tiles in common device batches."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch
from PIL import Image

from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.queue import Admission, PendingPrompt, TileQueue
from lmdeploy_vico.stage.tiles import Tile, TileCache
from lmdeploy_vico.vision.batches import RunningBatch, TileFeatures
from lmdeploy_vico.vision.encoder import RoutingGroup, VisionEncoder, VisualTokens
from lmdeploy_vico.vision.resample import pass_order
from lmdeploy_vico.vision.routing import Compression, parse_compression
from lmdeploy_vico.vision.tiling import tile_digests

logger = logging.getLogger(__name__)

READ_LOCKS = 16
ALIGNMENT = 16  # of objects in memory: what ids have in common says nothing
FAILURES = 3  # batches in a row, after which a device is given up if there are others


class EncodingError(RuntimeError):
    """A device failed on a prompt's tiles, twice; the request is not at fault."""


@dataclass(frozen=True)
class ImageJob:
    """One image of a prompt: the decoded picture, and what its request asked for.

    Attributes:
        image: as its client sent it.
        max_tiles: None for the server's default.
        compression: None to be routed together with the rest of the prompt.
        routed_with: jobs with the same number are routed together, at their own compression: the frames of a video.
    """

    image: Image.Image
    max_tiles: int | None = None
    compression: Compression | None = None
    routed_with: int | None = None


@dataclass(frozen=True)
class EncodedImage:
    """An image's visual tokens, on the CPU, and a content digest of each of its tiles."""

    tokens: VisualTokens
    digests: Sequence[bytes]


class VisionStage:
    """Turns prompts' images into visual tokens.

    Images are cut by a pool of threads. One thread owns each device: it fills every batch with the tiles of the oldest
    prompts, so that large prompts spread over several batches and small ones share one, and starts at once with what
    is there. A tile that is kept from earlier, or on its way for another prompt, is not encoded again. A prompt is
    routed and projected when its last tile is there, by the scores of its own tiles only. An exception belongs to the
    prompt that caused it and is raised from its future; a future that is cancelled takes its prompt out of the queue.

    Args:
        encoders: the vision side of the checkpoint, once for each device.
        output_dtype: dtype of the embeddings handed on, the language model's.
        threads: preparation threads.
        capacity: tiles that may wait; beyond, :meth:`submit` and :meth:`admit` raise StageBusyError. None: any number.
        cache_bytes: host memory for the ViT-level results of tiles that may come again.
    """

    def __init__(
        self,
        encoders: Sequence[VisionEncoder],
        output_dtype: torch.dtype,
        threads: int,
        capacity: int | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.encoder = encoders[0]
        self.output_dtype = output_dtype
        self._metrics = stage_metrics()
        self._queue = TileQueue(capacity, len(encoders))
        self._cache = TileCache(cache_bytes)
        self._prepare = ThreadPoolExecutor(threads, thread_name_prefix='vico-prepare')
        self._prepare.submit(pass_order)  # compiles the resizing, a second or two that no request shall wait for
        # Pillow cannot read one file from several threads: a lock for each picture, or for a few of them.
        self._reading = [threading.Lock() for _ in range(READ_LOCKS)]
        ready: list[Future[None]] = [Future() for _ in encoders]
        self._threads = [
            threading.Thread(target=self._run_device, args=[index, encoder, ready[index]], name=f'vico-device-{index}')
            for index, encoder in enumerate(encoders)
        ]
        for thread in self._threads:
            thread.daemon = True
            thread.start()
        for future in ready:
            future.result()

    def admit(self, size: int) -> Admission:
        """Hold a place for about ``size`` tiles of a request whose images are still to be decoded.

        Raises:
            StageBusyError: too many tiles are waiting.
        """
        return self._queue.admit(size)

    def release(self, admission: Admission) -> None:
        """Give a place back; what has been submitted with it stays queued."""
        self._queue.release(admission)

    def submit(
        self, jobs: Sequence[ImageJob], compression: Compression, admission: Admission | None = None
    ) -> 'Future[list[EncodedImage]]':
        """Queue the images of one prompt; ``compression`` holds for those that have none of their own.

        Raises:
            StageBusyError: too many tiles are waiting, and the prompt has no admission.
        """
        prompt = PendingPrompt(
            images=[None] * len(jobs),
            groups=_routing_groups(jobs, parse_compression(compression)),
            size=sum(self.encoder.tile_count(job.image.size, job.max_tiles) for job in jobs),
        )
        if not jobs:
            prompt.future.set_result([])
            return prompt.future
        self._queue.put(prompt, admission)
        try:
            cutting = [self._prepare.submit(self._cut, prompt, index, job) for index, job in enumerate(jobs)]
        except RuntimeError:  # the stage has been closed in the meantime
            prompt.future.cancel()
            return prompt.future
        # Of a prompt that failed or was cancelled, no further image is prepared.
        prompt.future.add_done_callback(lambda _: [future.cancel() for future in cutting])
        return prompt.future

    def close(self) -> None:
        """Stop the threads; what is queued is cancelled, what is on a device is finished first."""
        self._queue.close()
        self._prepare.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            thread.join()
        for prompt in self._queue.close():
            prompt.future.cancel()

    def _cut(self, prompt: PendingPrompt, index: int, job: ImageJob) -> None:
        try:
            with self._reading[id(job.image) // ALIGNMENT % READ_LOCKS]:
                job.image.load()  # does nothing for one that has been read
            with self._metrics.preprocess.time():
                pixels = self.encoder.cut(job.image, job.max_tiles)
                tiles = self._cache.get(tile_digests(pixels), pixels)
            given_up = self._queue.cut(prompt, index, tiles)
            if given_up is not None:
                _fail(prompt, _encoding_error(given_up))
        except Exception as error:
            _fail(prompt, error)

    def _run_device(self, device: int, encoder: VisionEncoder, ready: 'Future[None]') -> None:
        try:
            encoder.enter_thread()
            ready.set_result(None)
        except Exception as error:
            ready.set_exception(error)
            return
        running: _Running | None = None
        failures = 0  # batches in a row
        while running is not None or self._queue.serves(device):
            # Encoding the next batch is begun before the host waits for the last one.
            tiles = self._queue.take(encoder.tile_batch, running is None, device)
            started = self._start(device, encoder, tiles) if tiles else None
            failures += bool(tiles) and started is None
            if running is not None:
                failures = 0 if self._end(device, running) else failures + 1
            self._finish_encoded(encoder)
            if failures >= FAILURES and self._queue.retire(device):
                logger.error('%s has failed on %d batches in a row and is not used any more', encoder.device, failures)
            running = started

    def _start(self, device: int, encoder: VisionEncoder, tiles: list[Tile]) -> '_Running | None':
        self._metrics.tiles_per_batch.observe(len(tiles))
        try:
            return _Running(tiles, encoder.start([tile.pixels for tile in tiles if tile.pixels is not None]))
        except Exception as error:
            self._failed(device, tiles, error)
            return None

    def _end(self, device: int, running: '_Running') -> bool:
        """Whether the batch succeeded."""
        try:
            features = running.batch.wait()
            self._metrics.model_forward.observe(running.batch.seconds)
            for tile, patches, score in zip(running.tiles, features.patches, features.scores.tolist(), strict=True):
                tile.score = score
                tile.patches = patches  # from here on it counts as encoded
                tile.pixels = None
                self._cache.keep(tile)
        except Exception as error:
            self._failed(device, running.tiles, error)
            return False
        return True

    def _failed(self, device: int, tiles: Sequence[Tile], error: Exception) -> None:
        logger.error('encoding a batch of %d tiles failed: %s', len(tiles), error)
        for prompt in self._queue.give_back(tiles, error, device):
            _fail(prompt, _encoding_error(error))

    def _finish_encoded(self, encoder: VisionEncoder) -> None:
        # In a function of its own, whose last prompt does not outlive it: an idle device thread holds no tiles.
        for prompt in self._queue.pop_encoded():
            self._finish(encoder, prompt)

    def _finish(self, encoder: VisionEncoder, prompt: PendingPrompt) -> None:
        images = [image for image in prompt.images if image is not None]
        tiles = prompt.tiles
        features = TileFeatures(
            [tile.patches for tile in tiles if tile.patches is not None], torch.tensor([tile.score for tile in tiles])
        )
        try:
            tokens = encoder.visual_tokens(features, [len(image) for image in images], prompt.groups, self.output_dtype)
        except Exception as error:
            logger.error('projecting the %d tiles of a prompt failed: %s', len(tiles), error)
            _fail(prompt, _encoding_error(error))
            return
        for one in tokens:
            self._metrics.count_tiles(one.tile_tokens)
        with suppress(InvalidStateError):  # cancelled in the meantime
            prompt.future.set_result(
                [EncodedImage(one, [tile.digest for tile in image]) for one, image in zip(tokens, images, strict=True)]
            )


@dataclass(frozen=True)
class _Running:
    """A batch on a device, and whose it is."""

    tiles: list[Tile]
    batch: RunningBatch


def _routing_groups(jobs: Sequence[ImageJob], compression: Compression) -> list[RoutingGroup]:
    """Which images are routed together: those without a compression of their own, those of a video, or one alone."""
    groups: dict[object, tuple[list[int], Compression]] = {}
    for index, job in enumerate(jobs):
        if job.compression is None:
            groups.setdefault('prompt', ([], compression))[0].append(index)
        else:
            key = ('image', index) if job.routed_with is None else ('together', job.routed_with)
            groups.setdefault(key, ([], parse_compression(job.compression)))[0].append(index)
    return list(groups.values())


def _encoding_error(error: Exception) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return error
    wrapped = EncodingError(f'The images could not be encoded: {error}')
    wrapped.__cause__ = error
    return wrapped


def _fail(prompt: PendingPrompt, error: Exception) -> None:
    with suppress(InvalidStateError):  # cancelled, or failed already for another of its images
        prompt.future.set_exception(error)
