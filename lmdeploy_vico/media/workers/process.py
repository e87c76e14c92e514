"""The program of a process that decodes: ``python -m lmdeploy_vico.media.workers.process SOCKET MEMORY PARENT``.

It holds no secrets of the server, and may be killed at any time. It ends when the server does.
"""

import contextlib
import math
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from lmdeploy_vico.media.decoding import pictures, videos
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.options import PictureOptions, VideoOptions
from lmdeploy_vico.media.workers.channel import ChannelClosedError, anonymous_memory, close, receive, seal, send
from lmdeploy_vico.media.workers.confinement import confine, end_with

SLACK = 1 << 30  # bytes of address space for libraries that are loaded later, and their threads


def main() -> None:
    """Decode what comes through the socket until it is closed."""
    number, memory, parent = (int(argument) for argument in sys.argv[1:4])
    confine()
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    videos.prepare()
    if memory:
        _limit_memory(memory)
    channel = socket.socket(fileno=number)
    send(channel, {'ready': True})
    try:
        while True:
            _serve(channel)
    except ChannelClosedError:
        pass


def _limit_memory(size: int) -> None:
    """Let no file take more than ``size`` bytes, whatever its header said."""
    with open('/proc/self/statm') as file:
        taken = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (taken + size + SLACK,) * 2)


def _serve(channel: socket.socket) -> None:
    """Decode one file."""
    request, [file] = receive(channel)
    _limit_time(request['seconds'])
    answer, pixels = _answer(channel, file, request)
    # Before the server knows that this file is done: the limit must not end this process at the next one.
    _limit_time(None)
    try:
        if answer:
            send(channel, answer, pixels)
    finally:
        close(pixels)


def _limit_time(seconds: float | None) -> None:
    """Have the kernel end this process when it has computed for so much longer. Waiting for a processor is free.

    Args:
        seconds: of processor time; None for any number.
    """
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = most
    if seconds is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, most))


def _answer(channel: socket.socket, file: int, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """What is said of a file in the end, and the descriptor of its pixels; nothing where there is no room for them."""
    try:
        with os.fdopen(file, 'rb') as stream:
            data = stream.read()
        decode = _picture if request['kind'] == 'picture' else _video
        return decode(channel, data, request['options'])
    except MediaError as error:
        return {'error': str(error)}, []
    except MemoryError:
        return {'error': 'The image or video is too large to be decoded: the memory does not suffice.'}, []
    except ChannelClosedError:
        raise
    except Exception as error:  # decoders raise whatever their arithmetic makes of damaged bytes
        return {'error': f'The image or video is damaged: it cannot be decoded ({type(error).__name__}).'}, []


def _picture(channel: socket.socket, data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    picture = pictures.Picture(data, PictureOptions(**options))
    if not _may_decode(channel, picture.size, 1, picture.memory):
        return {}, []
    with _new_memory('pixels') as file:
        picture.write(file)
    return {'count': 1}, [file]


def _video(channel: socket.socket, data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    video = videos.Video(data, VideoOptions(**options))
    if not _may_decode(channel, video.size, video.count, video.memory):
        return {}, []
    with _new_memory('frames') as file:
        count = video.write(file)
    return {'count': count}, [file]


@contextlib.contextmanager
def _new_memory(name: str) -> Iterator[int]:
    """Yield a descriptor of memory, which is sealed after the block, or closed if that fails."""
    file = anonymous_memory(name)
    try:
        yield file
        seal(file)
    except BaseException:
        os.close(file)
        raise


def _may_decode(channel: socket.socket, size: tuple[int, int], count: int, memory: int) -> bool:
    """Say what is going to be taken, and ask whether there is room for it."""
    send(channel, {'size': size, 'count': count, 'memory': memory})
    return bool(receive(channel)[0]['go'])


if __name__ == '__main__':
    main()
