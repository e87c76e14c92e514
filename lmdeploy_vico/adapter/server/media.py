"""Decodes the images and videos of a request side by side, each with LMDeploy's own loaders."""

import asyncio
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy as np
import torch
from PIL import Image

from lmdeploy_vico.adapter.server.forms.named import NamedMedia
from lmdeploy_vico.adapter.server.items import MediaItem, VideoItem
from lmdeploy_vico.adapter.server.request import Job, VicoRequest
from lmdeploy_vico.adapter.server.served import decoding
from lmdeploy_vico.media.store import MediaStore
from lmdeploy_vico.stage.metrics import stage_metrics

CORES = os.cpu_count() or 1
THREADS = min(32, CORES + 4)
AT_ONCE = max(2, min(16, CORES))  # items of one request


class MediaParser:
    """Stands in for ``MultimodalProcessor.async_parse_multimodal_item``, and decodes a request item by item.

    LMDeploy parses every item as if it were the only one of its message. That happens in threads of our own: in the
    event loop's default executor, other work would wait behind slow downloads. A picture that is a Pillow object
    already is not touched; many items may refer to one object whose pixels have not been read yet.

    Args:
        processor: LMDeploy's MultimodalProcessor.
        store: keeps what clients name by ids; None for none.
    """

    def __init__(self, processor: Any, store: MediaStore | None = None) -> None:
        self._named = NamedMedia(store or MediaStore(0))
        self._parse_message = processor._parse_multimodal_item
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix='vico-decode')

    async def __call__(
        self,
        messages: VicoRequest,
        media_io_kwargs: Mapping[str, Any] | None = None,
        allowed_media_domains: list[str] | None = None,
    ) -> VicoRequest:
        """Return the request with its images and videos decoded.

        Args:
            messages: the request, by the name that LMDeploy gives it.
            media_io_kwargs: the request's, for LMDeploy's loaders.
            allowed_media_domains: the domains that LMDeploy fetches from; None for all.

        Raises:
            ValueError: that of the first item, in the prompt's order, that has one; or the images are too many.
        """
        loop = asyncio.get_running_loop()
        turn = asyncio.Semaphore(AT_ONCE)

        async def decode(number: int, item: MediaItem) -> Sequence[Job]:
            async with turn:
                arguments = number, item, media_io_kwargs or {}, allowed_media_domains
                return await loop.run_in_executor(self._threads, copy_context().run, self._decode, *arguments)

        tasks = deque(asyncio.create_task(decode(number, item)) for number, item in enumerate(messages.media))
        jobs: list[Sequence[Job]] = []
        try:
            while tasks:
                jobs.append(await tasks.popleft())
        except BaseException:
            # The error refers to this frame. If this frame went on referring to tasks, and so to errors, what has been
            # decoded would not be freed before Python looks for cycles.
            jobs.clear()
            while tasks:
                _give_up(tasks.popleft())
            raise
        return messages.decoded(jobs)

    @decoding()
    def _decode(
        self, number: int, item: MediaItem, media_io_kwargs: Mapping[str, Any], allowed_media_domains: Any
    ) -> Sequence[Job]:
        if isinstance(item, VideoItem):
            media_io_kwargs = {**media_io_kwargs, 'video': item.options}
        parsed: dict[int, dict[str, Any]] = {}
        try:
            with stage_metrics().decode.time():
                source = self._named.source(item, allowed_media_domains)
                kind = 'video_url' if isinstance(item, VideoItem) else 'image_url'
                messages = {item.message: {'role': 'user', 'content': [{'type': kind, kind: {'url': source}}]}}
                self._parse_message(item.message, messages, parsed, media_io_kwargs, allowed_media_domains)
        except NotImplementedError as error:  # of data URLs that are not base64
            raise ValueError(str(error)) from error
        except OSError as error:  # those of requests are OSErrors too
            # Only which status or error: anything more would tell of this machine and its network.
            response = getattr(error, 'response', None)
            reason = type(error).__name__ if response is None else f'status {response.status_code}'
            raise ValueError(f'An image or video could not be fetched: {reason}.') from error
        [found] = parsed[item.message]['content']
        data = found['data']
        if isinstance(item, VideoItem):
            data = video_frames(data, found['video_metadata']['video_backend'], item.num_frames)
        self._named.keep(item, source)
        return item.jobs(data, number)


def video_frames(frames: np.ndarray | torch.Tensor, backend: str, num_frames: int | None) -> list[Image.Image]:
    """The frames of a decoded video as pictures, at most ``num_frames`` if a client asked for a number.

    Args:
        frames: uint8 ``[T, H, W, 3]``; those of the backend "torchcodec" are ``[T, 3, H, W]``.
        backend: which of LMDeploy's loaders decoded them.
        num_frames: None or -1 for all. Of a sequence of JPEG frames LMDeploy decodes all, whatever it is asked for;
            these are sampled here as its loaders sample videos.
    """
    if isinstance(frames, torch.Tensor):
        frames = (frames.permute(0, 2, 3, 1) if backend == 'torchcodec' else frames).contiguous().cpu().numpy()
    if num_frames is not None and 0 < num_frames < len(frames):
        frames = frames[np.linspace(0, len(frames) - 1, num_frames, dtype=int)]
    return [Image.fromarray(frame) for frame in frames]


def _give_up(task: 'asyncio.Task[Sequence[Job]]') -> None:
    """Cancel a task of a request that has failed: what has not been begun is not decoded."""
    if not task.cancel() and not task.cancelled():
        task.exception()  # seen, so that asyncio does not log it
