"""One worker: a thread of the server, and the process that decodes for it."""

import contextlib
import dataclasses
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.memory import MemoryShare
from lmdeploy_vico.media.options import PictureOptions, VideoOptions
from lmdeploy_vico.media.workers.channel import ChannelClosedError, anonymous_memory, receive, send

logger = logging.getLogger(__name__)

KEPT = 4  # bytes of a pixel that Pillow keeps once it is decoded
PATIENCE = 10  # times the processor time that a file may take: seconds that it may take when processors are busy
START = 120.0  # seconds for a process to get ready
TRIES = 2  # of a file at whose decoding the process ended: perhaps something else ended it
MODULE = 'lmdeploy_vico.media.workers.process'


@dataclass(eq=False)
class Job:
    """A file to be decoded.

    Attributes:
        data: the file.
        options: how.
        share: what it takes memory of, None for any number; it is in use until the job has ended.
        extra: bytes that a picture of a width and a height takes later on, besides its pixels.
        seconds: of processor time that it may take.
        done: becomes the pictures.
        client_gone: whether nobody waits for it any more.
    """

    data: bytes
    options: PictureOptions | VideoOptions
    share: MemoryShare | None
    extra: Callable[[int, int], int]
    seconds: float
    done: Future[list[Image.Image]] = field(default_factory=Future)
    client_gone: bool = False


class Worker:
    """Starts its process when it is needed, and again after it has ended. Used by one thread, but for :meth:`kill`.

    Args:
        memory: bytes that the process may take for a file; None for any number.
    """

    def __init__(self, memory: int | None) -> None:
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process, if there is none, and wait until it is ready.

        Raises:
            ChannelClosedError, TimeoutError: it does not get ready.
        """
        if self._process is not None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, '-m', MODULE, str(theirs.fileno()), str(self._memory or 0), str(os.getpid())]
            # What this program imports is found there too, however it came to its path.
            environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)}
            environment.setdefault('OPENCV_FFMPEG_THREADS', '1')
            with self._lock:
                self._channel = ours
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
                )
        ours.settimeout(START)
        receive(ours)

    def kill(self) -> None:
        """End the process, whatever it does; any thread may call this."""
        with self._lock:
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()

    def stop(self) -> int:
        """End the process and everything it had; returns its exit status."""
        self.kill()
        with self._lock:
            process, channel = self._process, self._channel
            self._process = self._channel = None
        status = 0
        if process is not None:
            status = process.wait()
        if channel is not None:
            channel.close()
        return status

    def decode(self, job: Job) -> list[Image.Image]:
        """Decode a file.

        Raises:
            MediaError: it cannot be decoded, or takes too long.
            MediaBusyError: there is no memory for it now.
        """
        for attempt in range(TRIES):
            try:
                self.start()
                return self._decode(job)
            except (ChannelClosedError, TimeoutError) as error:
                status = self.stop()
                if job.client_gone:
                    raise MediaError('The client is gone.') from error
                if isinstance(error, TimeoutError) or status == -signal.SIGXCPU:
                    raise MediaError(
                        f'An image or video takes longer to decode than {job.seconds:g} seconds of a processor.'
                    ) from error
                logger.warning('a process that decodes ended with status %d, attempt %d', status, attempt + 1)
        raise MediaError('The image or video is damaged: it ends what decodes it.')

    def _decode(self, job: Job) -> list[Image.Image]:
        assert self._channel is not None
        self._channel.settimeout(job.seconds * PATIENCE)
        kind = 'video' if isinstance(job.options, VideoOptions) else 'picture'
        file = anonymous_memory('file')
        try:
            with os.fdopen(os.dup(file), 'wb') as stream:
                stream.write(job.data)
            os.lseek(file, 0, os.SEEK_SET)
            options = dataclasses.asdict(job.options)
            send(self._channel, {'kind': kind, 'options': options, 'seconds': job.seconds}, [file])
        finally:
            os.close(file)
        header = self._answer()[0]
        (width, height), count = header['size'], header['count']
        kept = count * width * height * KEPT
        passing = max(header['memory'] - kept, 0)
        try:
            if job.share is not None:
                job.share.take(kept + passing + job.extra(width, height), passing, wait=True)
        except BaseException:
            send(self._channel, {'go': False})
            raise
        try:
            send(self._channel, {'go': True})
            found, [pixels] = self._answer()
            try:
                return _images(pixels, width, height, found['count'])
            finally:
                os.close(pixels)
        finally:
            if job.share is not None:
                job.share.give_back(passing, passing)

    def _answer(self) -> tuple[dict[str, Any], list[int]]:
        assert self._channel is not None
        message, files = receive(self._channel)
        if 'error' in message:
            raise MediaError(message['error'])
        return message, files


def _images(file: int, width: int, height: int, count: int) -> list[Image.Image]:
    """The pictures whose RGB bytes ``[count, height, width, 3]`` are in a file."""
    size = width * height * 3
    with mmap.mmap(file, count * size, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
        return [_image(view[index * size : (index + 1) * size], width, height) for index in range(count)]


def _image(pixels: memoryview, width: int, height: int) -> Image.Image:
    with pixels:
        return Image.frombytes('RGB', (width, height), pixels)
