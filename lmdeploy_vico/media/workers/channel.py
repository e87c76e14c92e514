"""What a server and a process that decodes say to each other.

Over a pair of sockets that keep messages apart: small ones as JSON, files and pixels as descriptors of anonymous
memory, which has no name, takes no room in /dev/shm, and is gone with the last process that holds it.

    server   {"kind": "picture" or "video", "options": {...}} and the file
    process  {"size": [width, height], "count": frames, "memory": bytes}, or {"error": sentence}
    server   {"go": true}, or {"go": false} if there is no room
    process  {"count": frames} and the pixels, or {"error": sentence}
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 1 << 16  # bytes of a message


class ChannelClosedError(Exception):
    """The other process has ended."""


def send(channel: socket.socket, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
    """Send a message, with descriptors of this process that the other gets copies of."""
    try:
        socket.send_fds(channel, [json.dumps(message).encode()], files)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ChannelClosedError from error


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Wait for a message; returns it, and descriptors that have to be closed.

    Raises:
        ChannelClosedError: there will be none.
        TimeoutError: the socket has a timeout, and it has passed.
    """
    try:
        data, files, _, _ = socket.recv_fds(channel, LONGEST, 1)
    except ConnectionResetError as error:
        raise ChannelClosedError from error
    if not data:
        raise ChannelClosedError
    return json.loads(data), list(files)


def anonymous_memory(name: str) -> int:
    """A descriptor of memory without a name; ``name`` is for whoever looks into /proc."""
    return os.memfd_create(name, os.MFD_CLOEXEC)
