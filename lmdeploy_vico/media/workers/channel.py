"""What a server and a process that decodes say to each other.

Over a pair of sockets that keep messages apart: small ones as JSON, files and pixels as descriptors of anonymous
memory, which has no name, takes no room in /dev/shm, and is gone with the last process that holds it.

    server   {"kind": "picture" or "video", "options": {...}} and the file
    process  {"size": [width, height], "count": frames, "memory": bytes}, or {"error": sentence}
    server   {"go": true}, or {"go": false} if there is no room
    process  {"count": frames} and the pixels, or {"error": sentence}

A process may be taken over by what it decodes: whatever it says is checked, and its memory cannot change any more.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LONGEST = 1 << 16  # bytes of a message
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class ChannelClosedError(Exception):
    """The other process has ended."""


class ProtocolError(Exception):
    """The other process said what it cannot have to say."""


def send(channel: socket.socket, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
    """Send a message, with descriptors of this process that the other gets copies of."""
    try:
        socket.send_fds(channel, [json.dumps(message).encode()], files)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ChannelClosedError from error


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Wait for a message; returns it, and at most one descriptor, which has to be closed.

    Raises:
        ChannelClosedError: there will be none.
        ProtocolError: it is no message.
        TimeoutError: the socket has a timeout, and it has passed.
        OSError: this process may have no more descriptors.
    """
    try:
        data, files, flags, _ = socket.recv_fds(channel, LONGEST, 1)
    except ConnectionResetError as error:
        raise ChannelClosedError from error
    try:
        if not data:
            raise ChannelClosedError
        if flags & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, 'A descriptor that was sent has been lost')
        return _message(data), list(files)
    except BaseException:
        close(files)
        raise


def _message(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError('a message is not JSON') from error
    if not isinstance(message, dict):
        raise ProtocolError('a message is not an object')
    return message


def close(files: Iterable[int]) -> None:
    """Close descriptors."""
    for file in files:
        os.close(file)


def anonymous_memory(name: str) -> int:
    """A descriptor of memory without a name; ``name`` is for whoever looks into /proc."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def seal(file: int) -> None:
    """Let nobody change memory any more, nor its size."""
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)


def require_sealed(file: int, size: int) -> None:
    """Raise ProtocolError unless ``file`` is memory of ``size`` bytes that has been sealed.

    Whoever maps memory that another process can shrink is ended by the kernel (SIGBUS) when it reads what is gone.
    """
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError('a descriptor is not of anonymous memory') from error
    if seals & SEALS != SEALS:
        raise ProtocolError('memory is not sealed')
    if os.fstat(file).st_size != size:
        raise ProtocolError(f'memory has not the {size} bytes that were announced')
