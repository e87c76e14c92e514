"""One worker: a thread of the server, and the process that decodes for it."""

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from lmdeploy_vico.log import request_id
from lmdeploy_vico.media.errors import MediaBusyError, MediaError
from lmdeploy_vico.media.memory import MemoryShare
from lmdeploy_vico.media.options import PictureOptions, VideoOptions
from lmdeploy_vico.media.workers import answers
from lmdeploy_vico.media.workers.channel import (
    ChannelClosedError,
    ProtocolError,
    anonymous_memory,
    close,
    receive,
    send,
)
from lmdeploy_vico.media.workers.confinement import environment

logger = logging.getLogger(__name__)

KEPT = 4  # bytes of a pixel that Pillow keeps once it is decoded
# Times the processor time that a file may take: seconds that it may take when processors are busy.
PATIENCE = 10
VIDEO_PATIENCE = 3
START = 120.0  # seconds for a process to get ready
ENDING = 5.0  # seconds for a process that has closed its channel to end
TRIES = 2  # of a file at whose decoding the process ended: perhaps something else ended it
MODULE = 'lmdeploy_vico.media.workers.process'
BUSY = 'Images and videos cannot be decoded now. Try again later.'
CLOSED = 'The server is shutting down. Try again later.'
DAMAGED = 'The image or video is damaged: it ends what decodes it.'


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
        request: the id of the request that it is of.
    """

    data: bytes
    options: PictureOptions | VideoOptions
    share: MemoryShare | None
    extra: Callable[[int, int], int]
    seconds: float
    done: Future[list[Image.Image]] = field(default_factory=Future)
    client_gone: bool = False
    request: str = field(default_factory=request_id.get)

    @property
    def most(self) -> int:
        """How many pictures are asked for, at most."""
        if isinstance(self.options, PictureOptions):
            return 1
        return self.options.num_frames if self.options.num_frames > 0 else answers.LARGEST


class Worker:
    """Starts its process when it is needed, and again after it has ended.

    Used by one thread, but for :meth:`kill` and :meth:`close`.

    Args:
        memory: bytes that the process may take for a file; None for any number.
    """

    def __init__(self, memory: int | None) -> None:
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._killed = self._closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process, if there is none, and wait until it is ready.

        Raises:
            MediaBusyError: it does not get ready, which the log says, or the server is shutting down.
        """
        if self._killed:
            self.stop()
        if self._process is not None:
            return
        try:
            self._start()
        except (ChannelClosedError, ProtocolError, OSError) as error:
            killed = self._killed
            status = self.stop(ENDING if isinstance(error, ChannelClosedError) else 0)
            self._require_open()
            if not killed:
                logger.error('a process that decodes does not start: %r, status %d', error, status)
            raise MediaBusyError(BUSY) from error

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, '-m', MODULE, str(theirs.fileno()), str(self._memory or 0), str(os.getpid())]
            with self._lock:
                self._channel = ours
                self._require_open()
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=environment(os.environ, sys.path),
                )
        ours.settimeout(START)
        close(receive(ours)[1])

    def _require_open(self) -> None:
        if self._closed:
            raise MediaBusyError(CLOSED)

    def kill(self) -> None:
        """End the process, whatever it does; any thread may call this."""
        with self._lock:
            if self._process is not None:
                self._killed = True
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()

    def close(self) -> None:
        """End the process, and start no other; any thread may call this."""
        with self._lock:
            self._closed = True
        self.kill()

    def stop(self, patience: float = 0) -> int:
        """End the process and everything it had; returns its exit status.

        Args:
            patience: seconds for it to end by itself, so that the status says why.
        """
        if patience and self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self.kill()
        with self._lock:
            process, channel = self._process, self._channel
            self._process = self._channel = None
            self._killed = False
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
            MediaBusyError: there is no memory or no process for it now.
        """
        for attempt in range(TRIES):
            self.start()
            before = self._processor_time()
            try:
                return self._decode(job)
            except ChannelClosedError as error:
                status = self.stop(ENDING)
                if job.client_gone:
                    raise MediaError('The client is gone.') from error
                self._require_open()
                if status == -signal.SIGXCPU:
                    raise _slow(job) from error
                logger.warning('a process that decodes ended with status %d, attempt %d', status, attempt + 1)
            except ProtocolError as error:
                self.stop()
                logger.error('a process that decodes was ended, as something it said is wrong: %s', error)
                raise MediaError(DAMAGED) from error
            except TimeoutError as error:
                used = self._processor_time() - before
                self.stop()
                if used >= job.seconds:
                    raise _slow(job) from error
                logger.warning('a process that decodes was ended: it computed for %.1f seconds only', used)
                raise MediaBusyError(BUSY) from error
            except (OSError, MemoryError) as error:
                self.stop()
                raise _busy(error) from error
        raise MediaError(DAMAGED)

    def _processor_time(self) -> float:
        """Seconds that the process has computed for; 0 if it has ended."""
        assert self._process is not None
        try:
            # As clock_getcpuclockid(3) has it. Unlike a file of /proc, this takes no descriptor.
            return time.clock_gettime(~self._process.pid << 3 | 2)
        except OSError:
            return 0.0

    def _decode(self, job: Job) -> list[Image.Image]:
        assert self._channel is not None
        video = isinstance(job.options, VideoOptions)
        self._channel.settimeout(job.seconds * (VIDEO_PATIENCE if video else PATIENCE))
        with _file(job.data) as file:
            options = dataclasses.asdict(job.options)
            kind = 'video' if video else 'picture'
            send(self._channel, {'kind': kind, 'options': options, 'seconds': job.seconds}, [file])
        header = answers.header(self._answer(0)[0], job.most)
        pixels = header.width * header.height
        kept = header.count * pixels * KEPT
        passing = max(header.memory - kept, 0)
        taken = kept + passing + job.extra(header.width, header.height)
        if job.share is None:
            return self._pixels(header)
        try:
            job.share.take(taken, passing, wait=True)
        except BaseException:
            send(self._channel, {'go': False})
            raise
        try:
            images = self._pixels(header)
        except BaseException:
            job.share.give_back(taken, passing)
            raise
        job.share.give_back(passing, passing)
        return images

    def _pixels(self, header: answers.Header) -> list[Image.Image]:
        """Have what has been announced decoded."""
        assert self._channel is not None
        send(self._channel, {'go': True})
        found, [file] = self._answer(1)
        try:
            return answers.images(file, header.width, header.height, answers.count(found, header.count))
        finally:
            os.close(file)

    def _answer(self, descriptors: int) -> tuple[dict[str, Any], list[int]]:
        """Wait for an answer that comes with so many descriptors."""
        assert self._channel is not None
        message, files = receive(self._channel)
        try:
            if 'error' in message:
                raise MediaError(answers.sentence(message))
            if len(files) != descriptors:
                raise ProtocolError(f'an answer has {len(files)} descriptors, not {descriptors}')
        except BaseException:
            close(files)
            raise
        return message, files


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[int]:
    """Yield a descriptor of a copy of a file; raises MediaBusyError if there can be none now."""
    try:
        file = anonymous_memory('file')
    except OSError as error:
        raise _busy(error) from error
    try:
        with os.fdopen(file, 'wb', closefd=False) as stream:
            stream.write(data)
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


def _slow(job: Job) -> MediaError:
    return MediaError(f'An image or video takes longer to decode than {job.seconds:g} seconds of a processor.')


def _busy(error: BaseException) -> MediaBusyError:
    logger.warning('the server lacks what decoding takes: %r', error)
    return MediaBusyError(BUSY)
