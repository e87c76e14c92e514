"""Decodes the images and videos of a request side by side, each with LMDeploy's own loaders."""

import asyncio
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from typing import Any

import numpy as np
import torch
from PIL import Image

from lmdeploy_vico.adapter.server.pixels import decoding
from lmdeploy_vico.adapter.server.requests import IMAGE_TYPES, VIDEO_TYPES, check_kind, video_options
from lmdeploy_vico.stage.metrics import stage_metrics

Message = dict[str, Any]
CORES = os.cpu_count() or 1
THREADS = min(32, CORES + 4)
AT_ONCE = max(2, min(16, CORES))  # items of one request
TEXT = {'type': 'text'}


class MediaParser:
    """Stands in for ``MultimodalProcessor.async_parse_multimodal_item``: same arguments and result, but item by item.

    Every item is parsed by LMDeploy, as the only one of its message, in threads of our own: those of the event loop's
    default executor are for others, who would wait behind slow downloads. Pictures that are Pillow objects already pass
    through untouched; they may be the same lazy object many times.

    Args:
        processor: LMDeploy's MultimodalProcessor.
        session_len: gives the model's context length, which is not known before the first request.
    """

    def __init__(self, processor: Any, session_len: Callable[[], int | None]) -> None:
        self._parse_message = processor._parse_multimodal_item
        self._session_len = session_len
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix='vico-decode')

    async def __call__(
        self,
        messages: Sequence[Message],
        media_io_kwargs: Mapping[str, Any] | None = None,
        allowed_media_domains: list[str] | None = None,
    ) -> list[Message]:
        """Messages with decoded items; raises the error of the first item, in the prompt's order, that has one."""
        loop = asyncio.get_running_loop()
        turn = asyncio.Semaphore(AT_ONCE)

        async def parse(index: int, part: Message) -> Message:
            async with turn:
                arguments = index, part, media_io_kwargs or {}, allowed_media_domains
                return await loop.run_in_executor(self._threads, copy_context().run, self._parse, *arguments)

        parts = [_split(message) for message in messages]
        tasks = deque(
            asyncio.create_task(parse(index, part)) for index, of_message in enumerate(parts) for part in of_message
        )
        done: list[Message] = []
        try:
            while tasks:
                done.append(await tasks.popleft())
        except BaseException:
            # The error refers to this frame. If this frame went on referring to tasks, and so to errors, what has been
            # decoded would not be freed before Python looks for cycles.
            done.clear()
            while tasks:
                _give_up(tasks.popleft())
            raise
        parsed = iter(done)
        return [_join([next(parsed) for _ in of_message]) for of_message in parts]

    @decoding()
    def _parse(
        self, index: int, message: Message, media_io_kwargs: Mapping[str, Any], allowed_media_domains: Any
    ) -> Message:
        content = message.get('content')
        item = content[0] if isinstance(content, list) and content else TEXT
        if not isinstance(item, Mapping):
            raise ValueError(f'A content item must be an object with a "type", not {item!r}.')
        check_kind(item.get('type'))
        num_frames = None
        if item['type'] in VIDEO_TYPES:
            options, num_frames = video_options(item, media_io_kwargs, self._session_len())
            media_io_kwargs = {**media_io_kwargs, 'video': options}
        parsed: dict[int, Message] = {}
        timed = stage_metrics().decode.time() if item['type'] in (*IMAGE_TYPES, *VIDEO_TYPES) else nullcontext()
        try:
            with timed:
                self._parse_message(index, {index: message}, parsed, media_io_kwargs, allowed_media_domains)
        except NotImplementedError as error:
            raise ValueError(str(error)) from error
        except OSError as error:  # those of requests are OSErrors too
            # Which status or error, but no more: the rest would tell of this machine and its network.
            response = getattr(error, 'response', None)
            reason = type(error).__name__ if response is None else f'status {response.status_code}'
            raise ValueError(f'An image or video could not be fetched: {reason}.') from error
        if item['type'] in VIDEO_TYPES and parsed[index] is not message:
            [video] = parsed[index]['content']
            if isinstance(video['data'], np.ndarray | torch.Tensor):
                video['data'] = video_frames(video['data'], video['video_metadata']['video_backend'], num_frames)
        return parsed[index]


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


def _give_up(task: 'asyncio.Task[Message]') -> None:
    """Of a request that fails, what has not been begun is not decoded."""
    if not task.cancel() and not task.cancelled():
        task.exception()  # seen, so that asyncio does not log it


def _split(message: Message) -> list[Message]:
    content = message.get('content')
    if not isinstance(content, list) or len(content) < 2:
        return [message]
    return [{**message, 'content': [item]} for item in content]


def _join(parts: Sequence[Message]) -> Message:
    if len(parts) == 1:
        return parts[0]
    return {**parts[0], 'content': [item for part in parts for item in part['content']]}
