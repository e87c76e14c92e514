"""VisionStage: prepares the images of many requests in parallel and encodes their tiles in common device batches."""

import logging
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from PIL import Image

from lmdeploy_vico.choices import Compression, parse_compression
from lmdeploy_vico.stage.memory import StageMemory
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.queue import Admission, PendingPrompt, TileQueue
from lmdeploy_vico.stage.tiles import Tile, TileCache
from lmdeploy_vico.vision.batches import RunningBatch, TileFeatures
from lmdeploy_vico.vision.encoder import RoutingGroup, VisionEncoder, VisualTokens
from lmdeploy_vico.vision.resample import pass_order
from lmdeploy_vico.vision.tiling import tile_digests

logger = logging.getLogger(__name__)

READ_LOCKS = 16
ALIGNMENT = 16  # of objects in memory: what ids have in common says nothing
FAILURES = 3  # batches in a row, after which a device is given up if there are others
BROKEN = 'The device that encodes images has failed; the server has to be restarted.'


class EncodingError(RuntimeError):
    """A device failed on a prompt's tiles, twice; the request is not at fault."""


class DeviceStartError(RuntimeError):
    """The thread of ``device`` could not get ready; what happened is its cause."""

    def __init__(self, device: torch.device, error: Exception) -> None:
        super().__init__(f'The vision side cannot start on {device}: {error}')
        self.device = device
        self.__cause__ = error


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
    A device thread outlives whatever happens in it, and the tiles that it had are encoded once more. When the last
    device fails for good, which is how errors inside a CUDA device end, the stage accepts nothing any more.

    Args:
        encoders: the vision side of the checkpoint, once for each device.
        output_dtype: dtype of the embeddings handed on, the language model's.
        threads: preparation threads.
        capacity: tiles that may wait; beyond, :meth:`submit` and :meth:`admit` raise StageBusyError. None: any number.
        cache_bytes: host memory for the ViT-level results of tiles that may come again. For CUDA devices it is pinned,
            with what is in flight, in threads that begin when the devices are ready.

    Raises:
        DeviceStartError: a device could not be made ready; the threads of the others have ended.
    """

    def __init__(
        self,
        encoders: Sequence[VisionEncoder],
        output_dtype: torch.dtype,
        threads: int,
        capacity: int | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.encoder, self._encoders = encoders[0], encoders
        self.output_dtype = output_dtype
        self._metrics = stage_metrics()
        self._queue = TileQueue(capacity, len(encoders))
        self._cache = TileCache(cache_bytes)
        self._memory: StageMemory | None = None
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
        try:
            for future in ready:
                future.result()
        except DeviceStartError:
            self.close()
            raise
        # After the devices have warmed up, whose results need not lie in it. Nothing waits for it but the first batch.
        if self.encoder.copies_results:
            self._memory = StageMemory(encoders, output_dtype, self._cache)
        for encoder in encoders:
            encoder.use_memory(self._memory)

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
        """Stop the threads and let go of the memory.

        What is queued is cancelled, what is on a device is finished first.
        """
        self._queue.close()
        self._prepare.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            thread.join()
        for future in [prompt.future for prompt in self._queue.give_up()]:  # no name keeps a prompt and its tiles
            future.cancel()
        for encoder in self._encoders:
            encoder.use_memory(None)
        self._cache.clear()
        if self._memory is not None:
            self._memory.close()

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
            ready.set_exception(DeviceStartError(encoder.device, error))
            return
        worker = _Worker(device, encoder)
        while worker.running is not None or self._queue.serves(device):
            try:
                self._turn(worker)
            except Exception as error:
                self._recover(worker, error)

    def _turn(self, worker: '_Worker') -> None:
        # Encoding the next batch is begun before the host waits for the last one.
        tiles = self._queue.take(worker.encoder.tile_batch, worker.running is None, worker.device)
        if tiles:
            worker.batches.append(tiles)
        started = self._start(worker, tiles) if tiles else None
        failed = bool(tiles) and started is None
        worker.failures += failed
        if worker.running is not None:
            ended = self._end(worker, worker.running)
            worker.failures = 0 if ended else worker.failures + 1
            failed = failed or not ended
        worker.running = started
        if not self._finish_encoded(worker.encoder) or failed:
            self._consider(worker)

    def _recover(self, worker: '_Worker', error: Exception) -> None:
        """Go on after an error that nothing else has caught, as a thread that is started anew would."""
        logger.error('the thread of %s goes on after an error', worker.encoder.device, exc_info=error)
        worker.running = None
        worker.failures += 1
        for tiles in list(worker.batches):
            self._failed(worker, tiles, error)
        if worker.failures >= FAILURES:
            # It may be a waiting prompt that causes it, again and again.
            for prompt in self._queue.give_up():
                _fail(prompt, _encoding_error(error))
        self._consider(worker)

    def _consider(self, worker: '_Worker') -> None:
        """Decide whether a device is used after it has failed."""
        if not self._queue.serves(worker.device):
            return
        device, failures = worker.encoder.device, worker.failures
        usable = worker.encoder.usable()
        if usable and failures < FAILURES:
            return
        if self._queue.retire(worker.device):
            logger.error('%s has failed on %d batches in a row and is not used any more', device, failures)
        elif not usable:
            logger.critical('%s has failed for good and images cannot be encoded: restart the server', device)
            for prompt in self._queue.close(BROKEN):
                _fail(prompt, EncodingError(BROKEN))
        elif failures == FAILURES:
            logger.error(
                '%s has failed on %d batches in a row, and there is no other device: '
                'if requests with images go on failing, restart the server',
                *(device, failures),
            )

    def _start(self, worker: '_Worker', tiles: list[Tile]) -> '_Running | None':
        try:
            self._metrics.tiles_per_batch.observe(len(tiles))
            pixels = [tile.pixels for tile in tiles if tile.pixels is not None]
            return _Running(tiles, worker.encoder.start(pixels))
        except Exception as error:
            self._failed(worker, tiles, error)
            return None

    def _end(self, worker: '_Worker', running: '_Running') -> bool:
        """Whether the batch succeeded."""
        try:
            features = running.batch.wait()
            for tile, patches, score in zip(running.tiles, features.patches, features.scores.tolist(), strict=True):
                tile.score = score
                tile.patches = patches  # from here on it counts as encoded
                tile.pixels = None
                if self._memory is None or self._memory.may_keep(patches):
                    self._cache.keep(tile)
            self._metrics.model_forward.observe(running.batch.seconds)
        except Exception as error:
            self._failed(worker, running.tiles, error)
            return False
        worker.batches.remove(running.tiles)
        return True

    def _failed(self, worker: '_Worker', tiles: list[Tile], error: Exception) -> None:
        logger.error('encoding a batch of %d tiles failed: %s', len(tiles), _written_out(error))
        failed = self._queue.give_back(tiles, error, worker.device)
        worker.batches.remove(tiles)
        for prompt in failed:
            _fail(prompt, _encoding_error(error))

    def _finish_encoded(self, encoder: VisionEncoder) -> bool:
        """Whether all went well."""
        # In a function of its own, whose last prompt does not outlive it: an idle device thread holds no tiles.
        well = True
        for prompt in self._queue.pop_encoded():
            try:
                self._finish(encoder, prompt)
            except Exception as error:
                well = False
                logger.error('projecting the %d tiles of a prompt failed: %s', len(prompt.tiles), _written_out(error))
                _fail(prompt, _encoding_error(error))
        return well

    def _finish(self, encoder: VisionEncoder, prompt: PendingPrompt) -> None:
        images = [image for image in prompt.images if image is not None]
        tiles = prompt.tiles
        features = TileFeatures(
            [tile.patches for tile in tiles if tile.patches is not None], torch.tensor([tile.score for tile in tiles])
        )
        tokens = encoder.visual_tokens(features, [len(image) for image in images], prompt.groups, self.output_dtype)
        encoded = [
            EncodedImage(one, [tile.digest for tile in image]) for one, image in zip(tokens, images, strict=True)
        ]
        # From here on it cannot be cancelled: what is counted is handed on, and before anybody can ask for the counts.
        if prompt.future.set_running_or_notify_cancel():
            for one in tokens:
                self._metrics.count_tiles(one.tile_tokens)
            prompt.future.set_result(encoded)


@dataclass
class _Worker:
    """What the thread of a device knows.

    Attributes:
        batches: tiles that it has taken and neither encoded nor given back.
        running: the batch that the device encodes.
        failures: batches in a row.
    """

    device: int
    encoder: VisionEncoder
    batches: list[list[Tile]] = field(default_factory=list)
    running: '_Running | None' = None
    failures: int = 0


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


def _written_out(error: Exception) -> str:
    """The error with its traceback, as text for the log.

    The error itself has none any more: frames hold tiles, whose memory would not come back as long as a client, or a
    tile that is given up, keeps the error.
    """
    text = ''.join(traceback.format_exception(error))
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return text


def _encoding_error(error: Exception) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return error
    wrapped = EncodingError(f'The images could not be encoded: {error}')
    wrapped.__cause__ = error
    return wrapped


def _fail(prompt: PendingPrompt, error: Exception) -> None:
    with suppress(InvalidStateError):  # cancelled, or failed already for another of its images
        prompt.future.set_exception(error)
