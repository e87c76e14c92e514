"""A program in the place of a process that decodes. The file that it is sent says what it does.

Each of its answers but ``good`` is one that the real program never gives.
"""

import os
import socket
import sys

from lmdeploy_vico.media.workers.channel import anonymous_memory, receive, seal, send

WIDTH, HEIGHT = 8, 4
HEADER = {'size': [WIDTH, HEIGHT], 'count': 1, 'memory': WIDTH * HEIGHT * 11}
HEADERS = {
    'a side of no pixels': {**HEADER, 'size': [0, HEIGHT]},
    'a negative side': {**HEADER, 'size': [-WIDTH, HEIGHT]},
    'an endless side': {**HEADER, 'size': [10**30, HEIGHT]},
    'a side in words': {**HEADER, 'size': ['8', HEIGHT]},
    'a broken side': {**HEADER, 'size': [8.5, HEIGHT]},
    'three sides': {**HEADER, 'size': [WIDTH, HEIGHT, 1]},
    'no size': {'count': 1, 'memory': 1},
    'no pictures': {**HEADER, 'count': 0},
    'two pictures': {**HEADER, 'count': 2},
    'negative memory': {**HEADER, 'memory': -1},
    'a list': [HEADER],
    'a long error': {'error': 'x' * 10_000},
    'an error that is none': {'error': 5},
}
PIXELS = ('memory that can shrink', 'memory that is too small', 'no memory', 'no descriptor', 'more than announced')
OTHER = ('no JSON', 'deep JSON', 'an early descriptor')
WRONG = (*HEADERS, *PIXELS, *OTHER)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    send(channel, {'ready': True})
    while True:
        _, [file] = receive(channel)
        with os.fdopen(file) as stream:
            answer(channel, stream.read())


def answer(channel: socket.socket, what: str) -> None:
    if what == 'end':
        sys.exit(3)
    if what == 'wait':
        return
    if what == 'no JSON':
        channel.send(b'{"size": [8')
    elif what == 'deep JSON':
        channel.send(b'[' * 60_000)
    elif what == 'an early descriptor':
        send(channel, HEADER, [memory(1)])
    elif what in HEADERS:
        send(channel, HEADERS[what])
    else:
        send(channel, HEADER)
        if receive(channel)[0]['go']:
            send_pixels(channel, what)


def send_pixels(channel: socket.socket, what: str) -> None:
    count = 20 if what == 'more than announced' else 1
    file = memory(count, sealed=what != 'memory that can shrink', missing=what == 'memory that is too small')
    if what == 'no memory':
        file = os.open(__file__, os.O_RDONLY)
    send(channel, {'count': count}, [] if what == 'no descriptor' else [file])


def memory(count: int, sealed: bool = True, missing: int = 0) -> int:
    file = anonymous_memory('pixels')
    os.write(file, bytes(WIDTH * HEIGHT * 3 * count - missing))
    if sealed:
        seal(file)
    return file


if __name__ == '__main__':
    main()
