"""The program of a process that decodes: ``python -m lmdeploy_vico.media.workers.process SOCKET MEMORY PARENT``.

It holds nothing that another request could be harmed by, and may be killed at any time. It ends when the server does.
"""

import ctypes
import math
import mmap
import os
import resource
import signal
import socket
import sys
from typing import Any

from lmdeploy_vico.media.decoding import pictures, videos
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.options import PictureOptions, VideoOptions
from lmdeploy_vico.media.workers.channel import ChannelClosedError, anonymous_memory, receive, send

PR_SET_PDEATHSIG = 1
SLACK = 1 << 30  # bytes of address space for libraries that are loaded later, and their threads


def main() -> None:
    """Decode what comes through the socket until it is closed."""
    number, memory, parent = (int(argument) for argument in sys.argv[1:4])
    _end_with(parent)
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


def _end_with(parent: int) -> None:
    """Have the kernel end this process when the thread that started it has ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit()


def _limit_memory(size: int) -> None:
    """Let no file take more than ``size`` bytes, whatever its header said."""
    with open('/proc/self/statm') as file:
        taken = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (taken + size + SLACK,) * 2)


def _serve(channel: socket.socket) -> None:
    """Decode one file."""
    request, [file] = receive(channel)
    try:
        with os.fdopen(file, 'rb') as stream:
            data = stream.read()
        _limit_time(request['seconds'])
        decode = _picture if request['kind'] == 'picture' else _video
        decode(channel, data, request['options'])
    except MediaError as error:
        send(channel, {'error': str(error)})
    except MemoryError:
        send(channel, {'error': 'The image or video is too large to be decoded: the memory does not suffice.'})
    except ChannelClosedError:
        raise
    except Exception as error:  # decoders raise whatever their arithmetic makes of damaged bytes
        send(channel, {'error': f'The image or video is damaged: it cannot be decoded ({type(error).__name__}).'})


def _limit_time(seconds: float) -> None:
    """Have the kernel end this process when it has computed for so much longer. Waiting for a processor is free."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _picture(channel: socket.socket, data: bytes, options: dict[str, Any]) -> None:
    picture = pictures.Picture(data, PictureOptions(**options))
    if _may_decode(channel, picture.size, 1, picture.memory):
        file = anonymous_memory('pixels')
        try:
            picture.write(file)
            send(channel, {'count': 1}, [file])
        finally:
            os.close(file)


def _video(channel: socket.socket, data: bytes, options: dict[str, Any]) -> None:
    video = videos.Video(data, VideoOptions(**options))
    if _may_decode(channel, video.size, video.count, video.memory):
        file = anonymous_memory('frames')
        try:
            send(channel, {'count': video.write(file)}, [file])
        finally:
            os.close(file)


def _may_decode(channel: socket.socket, size: tuple[int, int], count: int, memory: int) -> bool:
    """Say what is going to be taken, and ask whether there is room for it."""
    send(channel, {'size': size, 'count': count, 'memory': memory})
    return bool(receive(channel)[0]['go'])


if __name__ == '__main__':
    main()
