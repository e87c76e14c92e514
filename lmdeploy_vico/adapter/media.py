"""Decodes the images and videos of a request side by side, each with LMDeploy's own loaders."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from requests import RequestException

from lmdeploy_vico.adapter.requests import VIDEO_TYPES, video_options

Message = dict[str, Any]


class MediaParser:
    """Stands in for ``MultimodalProcessor.async_parse_multimodal_item``: same arguments and result, item by item.

    Every item is parsed by LMDeploy, as the only one of its message, in the event loop's default executor. Pictures
    that are Pillow objects already pass through untouched; they may be the same lazy object many times.

    Args:
        processor: LMDeploy's MultimodalProcessor.
        session_len: gives the model's context length, which is not known before the first request.
    """

    def __init__(self, processor: Any, session_len: Callable[[], int | None]) -> None:
        self._parse_message = processor._parse_multimodal_item
        self._session_len = session_len

    async def __call__(
        self,
        messages: Sequence[Message],
        media_io_kwargs: Mapping[str, Any] | None = None,
        allowed_media_domains: list[str] | None = None,
    ) -> list[Message]:
        """Messages with decoded items; raises the error of the first item, in the prompt's order, that has one."""
        loop = asyncio.get_running_loop()
        parts = [_split(message) for message in messages]
        futures = [
            loop.run_in_executor(None, self._parse, index, part, media_io_kwargs or {}, allowed_media_domains)
            for index, of_message in enumerate(parts)
            for part in of_message
        ]
        try:
            parsed = iter([await future for future in futures])
        finally:
            for future in futures:  # of a request that fails, what has not been begun is not decoded
                if not future.cancel() and not future.cancelled():
                    future.exception()  # seen, so that asyncio does not log it
        return [_join([next(parsed) for _ in of_message]) for of_message in parts]

    def _parse(
        self, index: int, message: Message, media_io_kwargs: Mapping[str, Any], allowed_media_domains: Any
    ) -> Message:
        content = message.get('content')
        item = content[0] if isinstance(content, list) and content else {}
        if not isinstance(item, Mapping):
            raise ValueError(f'A content item must be an object with a "type", not {item!r}.')
        num_frames = None
        if item.get('type') in VIDEO_TYPES:
            options, num_frames = video_options(item, media_io_kwargs, self._session_len())
            media_io_kwargs = {**media_io_kwargs, 'video': options}
        parsed: dict[int, Message] = {}
        try:
            self._parse_message(index, {index: message}, parsed, media_io_kwargs, allowed_media_domains)
        except NotImplementedError as error:
            raise ValueError(str(error)) from error
        except RequestException as error:
            raise ValueError(f'A URL could not be fetched: {error}') from error
        if num_frames is not None and parsed[index] is not message:
            parsed[index]['content'][0]['num_frames'] = num_frames  # wherever the client said it
        return parsed[index]


def _split(message: Message) -> list[Message]:
    content = message.get('content')
    if not isinstance(content, list) or len(content) < 2:
        return [message]
    return [{**message, 'content': [item]} for item in content]


def _join(parts: Sequence[Message]) -> Message:
    if len(parts) == 1:
        return parts[0]
    return {**parts[0], 'content': [item for part in parts for item in part['content']]}
