"""VisionStage: prepares the images of many requests in parallel and encodes their tiles in common device batches."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.queue import Part, PendingImage, PendingPrompt, TileQueue
from lmdeploy_vico.vision.encoder import TileFeatures, VisionEncoder, VisualTokens
from lmdeploy_vico.vision.routing import Compression, parse_compression
from lmdeploy_vico.vision.tiling import tile_digests


@dataclass(frozen=True)
class ImageJob:
    """One image of a prompt: the decoded picture, and what its request asked for (None: the server's default).

    Jobs with the same number in ``routed_with`` are routed together, at their own compression.
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

    Images are cut by a pool of threads. One thread owns the device: it fills each batch with the tiles of the oldest
    prompts, so that large prompts spread over several batches and small ones share one, and starts at once with what
    is there. A prompt is routed and projected when its last tile has been encoded, by the scores of its own tiles
    only. An exception belongs to the prompt that caused it and is raised from its future; a future that is cancelled
    takes its prompt out of the queue.

    Args:
        encoder: the vision side of the checkpoint.
        output_dtype: dtype of the embeddings handed on, the language model's.
        threads: preparation threads.
        capacity: tiles that may wait; beyond, :meth:`submit` raises StageBusyError.
    """

    def __init__(self, encoder: VisionEncoder, output_dtype: torch.dtype, threads: int, capacity: int) -> None:
        self.encoder = encoder
        self.output_dtype = output_dtype
        self._metrics = stage_metrics()
        self._queue = TileQueue(capacity)
        self._prepare = ThreadPoolExecutor(threads, thread_name_prefix='vico-prepare')
        self._decoding = threading.Lock()
        self._device = threading.Thread(target=self._run_device, name='vico-device', daemon=True)
        self._device.start()

    def submit(self, jobs: Sequence[ImageJob], compression: Compression) -> 'Future[list[EncodedImage]]':
        """Queue the images of one prompt; ``compression`` holds for those that have none of their own.

        Raises:
            StageBusyError: too many tiles are waiting.
        """
        prompt = PendingPrompt(
            images=[PendingImage() for _ in jobs],
            compression=parse_compression(compression),
            image_compression=[job.compression for job in jobs],
            tiles=sum(self.encoder.tile_count(job.image.size, job.max_tiles) for job in jobs),
        )
        if not jobs:
            prompt.future.set_result([])
            return prompt.future
        self._queue.put(prompt)
        cutting = [
            self._prepare.submit(self._cut, prompt, image, job) for image, job in zip(prompt.images, jobs, strict=True)
        ]
        # Of a prompt that failed or was cancelled, no further image is prepared.
        prompt.future.add_done_callback(lambda _: [future.cancel() for future in cutting])
        return prompt.future

    def close(self) -> None:
        """Stop the threads; what is queued is cancelled, what is on the device is finished first."""
        waiting = self._queue.close()
        self._prepare.shutdown(wait=False, cancel_futures=True)
        self._device.join()
        for prompt in waiting:
            prompt.future.cancel()

    def _cut(self, prompt: PendingPrompt, image: PendingImage, job: ImageJob) -> None:
        try:
            with self._decoding:
                job.image.load()  # opened but not read yet? Pillow cannot read one file from several threads
            with self._metrics.preprocess.time():
                tiles = self.encoder.cut(job.image, job.max_tiles)
            self._queue.cut(image, tiles, tile_digests(tiles))
        except Exception as error:
            _fail(prompt, error)

    def _run_device(self) -> None:
        complete: list[PendingPrompt] = []
        while True:
            # Encoding the next batch is begun before the host waits for the scores of the last one.
            parts = self._queue.take(self.encoder.tile_batch, wait=not complete)
            if not parts and not complete:
                return
            encoded = self._encode(parts)
            for prompt in complete:
                self._finish(prompt)
            complete = encoded

    def _encode(self, parts: Sequence[Part]) -> list[PendingPrompt]:
        """Encode one batch; returns the prompts whose tiles have now all been encoded."""
        if not parts:
            return []
        prompts = list(dict.fromkeys(part.prompt for part in parts))
        self._count(prompts, sum(len(part.tiles) for part in parts))
        try:
            features = self.encoder.features(np.concatenate([part.tiles for part in parts]))
        except Exception as error:
            for prompt in prompts:
                _fail(prompt, error)
            return []
        start = 0
        for part in parts:
            of_part = slice(start, start + len(part.tiles))
            part.image.features.append(TileFeatures(features.patches[of_part], features.scores[of_part]))
            start += len(part.tiles)
        return [prompt for prompt in prompts if all(image.encoded for image in prompt.images)]

    def _count(self, prompts: Sequence[PendingPrompt], tiles: int) -> None:
        self._metrics.tiles_per_batch.observe(tiles)
        for prompt in prompts:
            if not prompt.begun:
                prompt.begun = True
                self._metrics.queue_wait.observe(time.perf_counter() - prompt.arrived)

    def _finish(self, prompt: PendingPrompt) -> None:
        if prompt.future.done():
            return
        try:
            parts = [part for image in prompt.images for part in image.features]
            tokens = self.encoder.visual_tokens(
                TileFeatures(torch.cat([part.patches for part in parts]), torch.cat([part.scores for part in parts])),
                [len(image.tiles) for image in prompt.images if image.tiles is not None],
                prompt.compression,
                prompt.image_compression,
            )
            images = [
                EncodedImage(replace(one, embeddings=one.embeddings.to('cpu', self.output_dtype)), image.digests)
                for one, image in zip(tokens, prompt.images, strict=True)
            ]
        except Exception as error:
            _fail(prompt, error)
            return
        for one in tokens:
            self._metrics.count_tiles(one.tile_tokens)
        with suppress(InvalidStateError):  # cancelled in the meantime
            prompt.future.set_result(images)


def _fail(prompt: PendingPrompt, error: Exception) -> None:
    with suppress(InvalidStateError):  # cancelled, or failed already for another of its images
        prompt.future.set_exception(error)
