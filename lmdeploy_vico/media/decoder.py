"""Decodes what clients send in processes that can be ended, a fair share of them for each client."""

import asyncio
import contextlib
import threading
from collections.abc import Callable

from PIL import Image

from lmdeploy_vico.log import about
from lmdeploy_vico.media.errors import MediaBusyError
from lmdeploy_vico.media.memory import MemoryShare
from lmdeploy_vico.media.options import PictureOptions, VideoOptions
from lmdeploy_vico.media.workers.queue import FairQueue
from lmdeploy_vico.media.workers.worker import CLOSED, Job, Worker


def _nothing(width: int, height: int) -> int:
    del width, height
    return 0


class MediaDecoder:
    """Processes that decode pictures and videos. Safe to use from several threads and event loops.

    Args:
        processes: how many. Each takes about 40 MB, and 50 more once it has read a video.
        picture_seconds: of processor time that a picture may take.
        video_seconds: the same of a video.
        memory: bytes that a process may take for one file, a second line behind the counting; None for any number.
        eager: whether processes are started at once, or when they are needed.
    """

    def __init__(
        self,
        processes: int,
        picture_seconds: float = 10,
        video_seconds: float = 120,
        memory: int | None = None,
        eager: bool = False,
    ) -> None:
        self._picture_seconds, self._video_seconds = picture_seconds, video_seconds
        self._queue: FairQueue[Job] = FairQueue(processes)
        self._workers = [Worker(memory) for _ in range(processes)]
        self._running: dict[Job, Worker] = {}
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(worker, eager), name=f'vico-decode-{number}', daemon=True)
            for number, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    async def picture(
        self,
        data: bytes,
        options: PictureOptions,
        share: MemoryShare | None = None,
        client: str = '',
        extra: Callable[[int, int], int] = _nothing,
    ) -> Image.Image:
        """Decode a picture; cancelling this ends the decoding.

        Args:
            data: the file.
            options: how it becomes RGB.
            share: what it takes memory of, before it is decoded; None for any number.
            client: who sent it.
            extra: bytes that a picture of a width and a height takes later on, which are taken too.

        Returns:
            The picture in mode RGB.

        Raises:
            MediaError: it cannot be decoded, takes too long, or is too large.
            MediaBusyError: there is no memory or no process for it now.
        """
        [image] = await self._run(client, Job(data, options, share, extra, self._picture_seconds))
        return image

    async def video(
        self, data: bytes, options: VideoOptions, share: MemoryShare | None = None, client: str = ''
    ) -> list[Image.Image]:
        """Decode frames of a video, as :meth:`picture` decodes a picture."""
        return await self._run(client, Job(data, options, share, _nothing, self._video_seconds))

    async def _run(self, client: str, job: Job) -> list[Image.Image]:
        self._queue.put(client, job)
        try:
            return await asyncio.wrap_future(job.done)
        except asyncio.CancelledError:
            self._abandon(client, job)
            raise

    def _abandon(self, client: str, job: Job) -> None:
        """Nobody waits for a job any more."""
        job.client_gone = True
        if self._queue.drop(client, job):
            return
        with self._lock:
            worker = self._running.get(job)
            if worker is not None:
                worker.kill()

    def _work(self, worker: Worker, eager: bool) -> None:
        if eager:
            # Whoever sends a file first has it tried again.
            with contextlib.suppress(MediaBusyError):
                worker.start()
        while (taken := self._queue.take()) is not None:
            client, job = taken
            with about(job.request):
                self._serve(worker, job)
            self._queue.done(client)
            # Nothing of the last job is held while there is no other.
            del taken, job
        worker.stop()

    def _serve(self, worker: Worker, job: Job) -> None:
        with self._lock:
            self._running[job] = worker
        try:
            if job.client_gone or not job.done.set_running_or_notify_cancel():
                return
            if job.share is None:
                images = worker.decode(job)
            else:
                with job.share.in_use():
                    images = worker.decode(job)
        except BaseException as error:
            job.done.set_exception(error)
        else:
            job.done.set_result(images)
        finally:
            with self._lock:
                del self._running[job]

    def close(self) -> None:
        """End all processes; what waits, or is being decoded, fails with MediaBusyError."""
        for job in self._queue.close():
            if job.done.set_running_or_notify_cancel():
                job.done.set_exception(MediaBusyError(CLOSED))
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join()
