"""VisionStage: prepares the images of many requests in parallel, encodes them on one device prompt by prompt."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from lmdeploy_vico.vision.encoder import VisionEncoder, VisualTokens
from lmdeploy_vico.vision.routing import Compression
from lmdeploy_vico.vision.tiling import tile_digests


@dataclass(frozen=True)
class ImageJob:
    """One image of a prompt: the decoded picture, and what its request asked for (None: the server's default)."""

    image: Image.Image
    max_tiles: int | None = None
    compression: Compression | None = None


@dataclass(frozen=True)
class EncodedImage:
    """An image's visual tokens, on the CPU, and a content digest of each of its tiles."""

    tokens: VisualTokens
    digests: list[bytes]


class VisionStage:
    """Turns prompts' images into visual tokens.

    Images are cut by a pool of threads while earlier prompts are on the device; one thread owns the device. An
    exception belongs to the prompt that caused it and is raised from its future.

    Args:
        encoder: the vision side of the checkpoint.
        output_dtype: dtype of the embeddings handed on, the language model's.
        threads: preparation threads.
    """

    def __init__(self, encoder: VisionEncoder, output_dtype: torch.dtype, threads: int) -> None:
        self.encoder = encoder
        self.output_dtype = output_dtype
        self._prepare = ThreadPoolExecutor(threads, thread_name_prefix='vico-prepare')
        self._device = ThreadPoolExecutor(1, thread_name_prefix='vico-device')
        self._decoding = threading.Lock()

    def submit(self, jobs: Sequence[ImageJob], compression: Compression) -> 'Future[list[EncodedImage]]':
        """Queue the images of one prompt; ``compression`` holds for those that have none of their own."""
        prepared = [self._prepare.submit(self._cut, job) for job in jobs]
        encoded = self._device.submit(self._encode, list(jobs), prepared, compression)
        # Of a prompt that failed or was cancelled, no further image is prepared.
        encoded.add_done_callback(lambda _: [future.cancel() for future in prepared])
        return encoded

    def close(self) -> None:
        """Stop the threads; what is queued is cancelled."""
        self._prepare.shutdown(wait=False, cancel_futures=True)
        self._device.shutdown(wait=False, cancel_futures=True)

    def _cut(self, job: ImageJob) -> tuple[np.ndarray, list[bytes]]:
        with self._decoding:
            job.image.load()  # opened but not read yet? Pillow cannot read one file from several threads
        tiles = self.encoder.cut(job.image, job.max_tiles)
        return tiles, tile_digests(tiles)

    def _encode(
        self, jobs: list[ImageJob], prepared: 'list[Future[tuple[np.ndarray, list[bytes]]]]', compression: Compression
    ) -> list[EncodedImage]:
        cut = [future.result() for future in prepared]
        encoded = self.encoder.encode_tiles([tiles for tiles, _ in cut], compression, [job.compression for job in jobs])
        return [
            EncodedImage(replace(tokens, embeddings=tokens.embeddings.to('cpu', self.output_dtype)), digests)
            for tokens, (_, digests) in zip(encoded, cut, strict=True)
        ]
