"""Whether a request may have its images decoded: asked before LMDeploy decodes them."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from lmdeploy_vico.adapter.overload import OverloadError
from lmdeploy_vico.stage.queue import Admission, StageBusyError
from lmdeploy_vico.stage.stage import VisionStage

DEFAULT_FRAMES = 32  # what LMDeploy takes of a video unless a request says otherwise
IMAGES = ('image_url', 'image', 'image_data')
VIDEOS = ('video_url', 'video')

_current: ContextVar[Admission | None] = ContextVar('vico_admission', default=None)


@asynccontextmanager
async def admitted(stage: VisionStage, tiles: int) -> AsyncIterator[None]:
    """Hold a place in the stage for what is prepared inside; :func:`current_admission` hands it on.

    Raises:
        OverloadError: too many tiles are waiting already.
    """
    try:
        admission = stage.admit(tiles)
    except StageBusyError as error:
        raise OverloadError(str(error)) from error
    token = _current.set(admission)
    try:
        yield
    finally:
        _current.reset(token)
        stage.release(admission)


def current_admission() -> Admission | None:
    """The place that is held for the request being prepared."""
    return _current.get()


def estimate_tiles(messages: Sequence[Any], media_io_kwargs: Mapping[str, Any] | None, tiles_per_image: int) -> int:
    """How many tiles a request will have, from what it says: every image as large as it may be.

    The request is not checked yet, so anything may stand anywhere.
    """
    contents = [message.get('content') for message in messages if isinstance(message, Mapping)]
    items = [item for content in contents if isinstance(content, list) for item in content if isinstance(item, Mapping)]
    images = sum(item.get('type') in IMAGES for item in items)
    frames = sum(_frames(item, media_io_kwargs) for item in items if item.get('type') in VIDEOS)
    return images * tiles_per_image + frames


def _frames(item: Mapping[str, Any], media_io_kwargs: Mapping[str, Any] | None) -> int:
    """What a video's item says comes before what the request says."""
    value = item.get(item['type'])
    for said in (value if isinstance(value, Mapping) else item, (media_io_kwargs or {}).get('video')):
        frames = said.get('num_frames') if isinstance(said, Mapping) else None
        if isinstance(frames, int) and frames > 0:
            return frames
    return DEFAULT_FRAMES
