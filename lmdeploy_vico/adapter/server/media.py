"""Decodes the images and videos of a request side by side, in the place of LMDeploy's loaders."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lmdeploy_vico.adapter.server.forms.named import NamedMedia
from lmdeploy_vico.adapter.server.items import DEFAULT_FRAMES, ImageItem, MediaItem, SyntheticItem, VideoItem
from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.request import Job, VicoRequest
from lmdeploy_vico.adapter.server.served import served_request
from lmdeploy_vico.media.errors import MediaBusyError
from lmdeploy_vico.media.loader import MediaLoader, Origin, in_order
from lmdeploy_vico.media.options import VideoOptions
from lmdeploy_vico.media.store import MediaStore
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.vision.tiling import preparation_memory

AT_ONCE = max(2, min(16, os.cpu_count() or 1))  # items of one request


class MediaParser:
    """Stands in for ``MultimodalProcessor.async_parse_multimodal_item``, and decodes a request item by item.

    A picture that is a Pillow object already is not touched; many items may refer to one object whose pixels have not
    been read yet.

    Args:
        loader: loads images and videos.
        store: keeps what clients name by ids; None for none.
    """

    def __init__(self, loader: MediaLoader, store: MediaStore | None = None) -> None:
        self._loader = loader
        self._named = NamedMedia(store or MediaStore(0))

    async def __call__(
        self,
        messages: VicoRequest,
        media_io_kwargs: Mapping[str, Any] | None = None,
        allowed_media_domains: list[str] | None = None,
    ) -> VicoRequest:
        """Return the request with its images and videos decoded.

        Args:
            messages: the request, by the name that LMDeploy gives it.
            media_io_kwargs: not used; the request has been parsed.
            allowed_media_domains: the domains that are fetched from; None for all.

        Raises:
            ValueError: that of the first item, in the prompt's order, that has one; or the images are too many.
            OverloadError: there is no memory for them now.
        """
        served = served_request()
        origin = Origin(
            client=served.client if served else '',
            share=served.pixels if served else None,
            allowed_hosts=allowed_media_domains,
        )
        turn = asyncio.Semaphore(AT_ONCE)

        async def decode(number: int, item: MediaItem) -> Sequence[Job]:
            async with turn:
                return await self._decode(number, item, origin)

        try:
            jobs = await in_order(decode(number, item) for number, item in enumerate(messages.media))
        except MediaBusyError as error:
            raise OverloadError(str(error)) from None
        return messages.decoded(jobs)

    async def _decode(self, number: int, item: MediaItem, origin: Origin) -> Sequence[Job]:
        if isinstance(item, SyntheticItem):
            return item.jobs(None, number)
        with stage_metrics().decode.time():
            if isinstance(item, VideoItem):
                source, keep = self._named.source(item), self._named.keep(item)
                return item.jobs(await self._loader.video(source, origin, _video_options(item), keep), number)
            if isinstance(item.source, Image.Image):
                return item.jobs(item.source, number)
            return await self._image(item, number, origin)

    async def _image(self, item: ImageItem, number: int, origin: Origin) -> Sequence[Job]:
        grid = None

        def prepared(width: int, height: int) -> int:
            nonlocal grid
            grid = item.tiling.grid((width, height))
            return preparation_memory((width, height), grid)

        picture = await self._loader.picture(self._named.source(item), origin, prepared, self._named.keep(item))
        return item.jobs(picture, number, grid)


def _video_options(item: VideoItem) -> VideoOptions:
    """Which frames: of a sequence of JPEGs all, unless the client asks for a number."""
    if item.jpegs and item.num_frames is None:
        return VideoOptions(num_frames=-1)
    return VideoOptions(int(item.options.get('num_frames', DEFAULT_FRAMES)), item.options.get('fps'))
