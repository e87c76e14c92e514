"""From a URL to pictures: reads or fetches the file, and has it decoded."""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from lmdeploy_vico.media.decoder import MediaDecoder
from lmdeploy_vico.media.decoding.videos import sampled
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.fetch import Fetcher
from lmdeploy_vico.media.memory import MemoryShare
from lmdeploy_vico.media.options import PictureOptions, VideoOptions
from lmdeploy_vico.media.sources import (
    JPEG_SEQUENCE,
    NO_FILE,
    is_data_url,
    is_web_url,
    parse_data_url,
    read_file,
)

T = TypeVar('T')
Keep = Callable[[bytes], None]
READERS = 2  # threads that decode base64 and read files
COPIES = 3  # of a file while it is decoded: what was received, on its way to the process that decodes, and there


@dataclass(frozen=True)
class Files:
    """Which files of this machine may be read.

    Attributes:
        allowed: whether any may.
        root: those below this directory, which is resolved; None for all.
    """

    allowed: bool = False
    root: Path | None = None


@dataclass(frozen=True)
class Origin:
    """For whom something is loaded.

    Attributes:
        client: each client gets a fair share of what fetches and decodes.
        share: of the memory for all requests; None for any number of bytes.
        allowed_hosts: the only ones that are fetched from; None for all.
    """

    client: str = ''
    share: MemoryShare | None = None
    allowed_hosts: Collection[str] | None = None


class MediaLoader:
    """Loads the images and videos of a server.

    Args:
        decoder: decodes them.
        fetcher: fetches them.
        files: which may be read.
        limit: bytes of a file.
        options: how pictures become RGB.
    """

    def __init__(
        self, decoder: MediaDecoder, fetcher: Fetcher, files: Files, limit: int, options: PictureOptions
    ) -> None:
        self._decoder, self._fetcher, self._files = decoder, fetcher, files
        self._limit, self._options = limit, options
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix='vico-read')

    async def picture(
        self, source: str | bytes, origin: Origin, extra: Callable[[int, int], int], keep: Keep | None = None
    ) -> Image.Image:
        """Load a picture.

        Args:
            source: its URL, or the file itself.
            origin: for whom.
            extra: bytes that a picture of a width and a height takes later on, besides its pixels.
            keep: called with the file when it has been decoded.

        Raises:
            MediaError: it cannot be loaded.
            MediaBusyError: there is no memory for it now.
        """
        with _held(origin) as hold:
            data = await self._bytes(source, origin, hold)
            picture = await self._decoder.picture(data, self._options, origin.share, origin.client, extra)
        if keep is not None:
            keep(data)
        return picture

    async def video(
        self, source: str | bytes, origin: Origin, options: VideoOptions, keep: Keep | None = None
    ) -> list[Image.Image]:
        """Load frames of a video, or of a sequence of JPEGs, all of which are taken if ``num_frames`` is -1.

        Args:
            source: its URL, or what was kept of it.
            origin: for whom.
            options: which frames.
            keep: called with the file, or with the URL of a sequence, when it has been decoded.

        Raises:
            MediaError, MediaBusyError: as :meth:`picture`.
        """
        if isinstance(source, bytes) and source.startswith(b'data:'):
            source = source.decode()
        with _held(origin) as hold:
            if isinstance(source, str) and is_data_url(source) and parse_data_url(source).media_type == JPEG_SEQUENCE:
                frames = await self._sequence(source, origin, options, hold)
                data = source.encode()
            else:
                data = await self._bytes(source, origin, hold)
                frames = await self._decoder.video(data, options, origin.share, origin.client)
        if keep is not None:
            keep(data)
        return frames

    async def _sequence(
        self, url: str, origin: Origin, options: VideoOptions, hold: Callable[[int], None]
    ) -> list[Image.Image]:
        parts = await self._read(lambda: parse_data_url(url).decode_parts(self._limit))
        hold(COPIES * sum(len(part) for part in parts))
        # With fps, which LMDeploy takes to be the sequence's own, no frames are left out.
        wanted = sampled(len(parts), options.num_frames, -1, 0)
        plain = PictureOptions(upright=False, on_white=self._options.on_white)
        try:
            return await in_order(
                self._decoder.picture(parts[index], plain, origin.share, origin.client) for index in wanted
            )
        except MediaError as error:
            raise MediaError(f'A frame of the video cannot be read. {error}') from None

    async def _bytes(self, source: str | bytes, origin: Origin, hold: Callable[[int], None]) -> bytes:
        """The file, with its copies counted."""
        if isinstance(source, bytes):
            hold(COPIES * len(source))
            return source
        url = source
        if is_web_url(url):
            return await self._fetcher.fetch(url, origin.client, origin.allowed_hosts, lambda size: hold(COPIES * size))
        if is_data_url(url):
            data = await self._read(lambda: parse_data_url(url).decode(self._limit))
        elif self._files.allowed:
            data = await self._read(lambda: read_file(url, self._files.root, self._limit))
        else:
            raise MediaError(NO_FILE)
        hold(COPIES * len(data))
        return data

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    def close(self) -> None:
        """End what decodes and what fetches."""
        self._fetcher.close()
        self._decoder.close()
        self._readers.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _held(origin: Origin) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts bytes until the block ends."""
    if origin.share is None:
        yield lambda size: None
    else:
        with origin.share.for_a_while() as take:
            yield take


async def in_order(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do everything at the same time; the results, or the error of the first work that has one.

    The others are cancelled then, and when this is cancelled.
    """
    tasks = deque(asyncio.ensure_future(work) for work in works)
    results: list[T] = []
    try:
        while tasks:
            results.append(await tasks.popleft())
    except BaseException:
        # The error refers to this frame. If this frame went on referring to tasks, and so to errors, what has been
        # decoded would not be freed before Python looks for cycles.
        results.clear()
        while tasks:
            _give_up(tasks.popleft())
        raise
    return results


def _give_up(task: 'asyncio.Future[Any]') -> None:
    if not task.cancel() and not task.cancelled():
        task.exception()  # seen, so that asyncio does not log it
