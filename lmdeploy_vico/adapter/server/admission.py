"""Whether a request may have its images decoded: asked before LMDeploy decodes them."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from lmdeploy_vico.adapter.server.disconnect import ServedRequest, served_request
from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.pixels import PixelBudget, PixelShare
from lmdeploy_vico.adapter.server.requests import (
    IMAGE_TYPES,
    VIDEO_TYPES,
    jpeg_frames,
    parameters,
    tile_limit,
    video_options,
)
from lmdeploy_vico.stage.queue import Admission, StageBusyError
from lmdeploy_vico.stage.stage import VisionStage

DEFAULT_FRAMES = 32  # what LMDeploy takes of a video unless a request says otherwise

_current: ContextVar[Admission | None] = ContextVar('vico_admission', default=None)


@asynccontextmanager
async def admitted(stage: VisionStage, tiles: int, pixels: PixelBudget) -> AsyncIterator[None]:
    """Hold a place in the stage for what is prepared inside; :func:`current_admission` hands it on.

    All choices of a request with ``n`` above 1 share one place: their images are the same. Each of them decodes these
    for itself, and what that takes of the budget is added up.

    Raises:
        OverloadError: too much is waiting already.
    """
    request = served_request() or ServedRequest()
    try:
        admission = request.admission = request.admission or stage.admit(tiles)
    except StageBusyError as error:
        raise OverloadError(str(error)) from error
    share = request.pixels = request.pixels or PixelShare(pixels)
    request.preparing += 1
    token = _current.set(admission)
    try:
        with share.in_use():
            yield
    finally:
        _current.reset(token)
        request.preparing -= 1
        if not request.preparing:
            request.admission = None
            stage.release(admission)


def current_admission() -> Admission | None:
    """The place that is held for the request being prepared."""
    return _current.get()


def estimate_tiles(
    messages: Sequence[Any],
    media_io_kwargs: Any,
    tiles_per_image: int,
    max_tiles: int,
    session_len: int | None,
) -> tuple[int, int]:
    """How many tiles a request will have, from what it says before anything is fetched, decoded or checked.

    Args:
        messages: as the client sent them; anything may stand anywhere.
        media_io_kwargs: the request's.
        tiles_per_image: of an image for which nothing is asked, at most.
        max_tiles: the server's limit on the tiles of one image, without its thumbnail.
        session_len: the model's context length, if it is known.

    Returns:
        The least and the most that it can be; a mistake in an item, which is found later, counts as if it were not
        there.
    """
    least = most = 0
    for item in _items(messages):
        least += 1
        if item['type'] in IMAGE_TYPES:
            most += _image_tiles(item, tiles_per_image, max_tiles)
        else:
            most += _frames(item, media_io_kwargs, session_len)
    return least, most


def _items(messages: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        content = message.get('content') if isinstance(message, Mapping) else None
        for item in content if isinstance(content, list) else []:
            if isinstance(item, Mapping) and item.get('type') in (*IMAGE_TYPES, *VIDEO_TYPES):
                yield item


def _image_tiles(item: Mapping[str, Any], default: int, max_tiles: int) -> int:
    try:
        limit = tile_limit(parameters(item), max_tiles)
    except ValueError:
        limit = None
    return default if limit is None else limit + 1


def _frames(item: Mapping[str, Any], media_io_kwargs: Any, session_len: int | None) -> int:
    try:
        options, asked = video_options(item, media_io_kwargs or {}, session_len)
    except (ValueError, AttributeError):
        return DEFAULT_FRAMES
    frames = int(options.get('num_frames', DEFAULT_FRAMES))
    sequence = jpeg_frames(item)
    if not sequence:
        return frames
    return sequence if asked is None else min(sequence, frames)
