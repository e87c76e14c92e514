"""What a process that decodes does between two files."""

import os
import resource
import socket

import pytest
from media.files import encoded, noise

from lmdeploy_vico.media.workers import process
from lmdeploy_vico.media.workers.channel import anonymous_memory, receive, send

PICTURE = encoded(noise(), 'PNG')
OPTIONS = {'upright': True, 'on_white': True}


@pytest.fixture
def limits(monkeypatch):
    """The limits of processor time that are set, in order: none of them is set for this process."""
    found = []
    monkeypatch.setattr(resource, 'setrlimit', lambda kind, limit: found.append(limit[0]))
    return found


@pytest.mark.parametrize('data, go', [(PICTURE, True), (PICTURE, False), (b'no picture', None)])
def test_the_limit_of_a_file_holds_for_that_file_only(limits, monkeypatch, data, go):
    """It is set before the file is read, and lifted before the server hears that the file is done."""
    events = []
    monkeypatch.setattr(process, 'send', lambda *args: (events.append(len(limits)), send(*args)))
    server, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with server, channel, open(anonymous_memory('file'), 'w+b') as file:
        file.write(data)
        file.seek(0)
        send(server, {'kind': 'picture', 'options': OPTIONS, 'seconds': 5}, [file.fileno()])
        if go is not None:
            send(server, {'go': go})
        reads = []
        fdopen = os.fdopen
        monkeypatch.setattr(os, 'fdopen', lambda *args: (reads.append(len(limits)), fdopen(*args))[1])
        process._serve(channel)
        monkeypatch.undo()
        answers = [receive(server) for _ in events]
    for _, pixels in answers:
        for descriptor in pixels:
            os.close(descriptor)
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    assert len(limits) == 2 and limits[0] <= used.ru_utime + used.ru_stime + 6 and limits[1] == hard
    assert reads == [1]
    asked = [1] if go is not None else []
    assert events == asked + ([] if go is False else [2])
    assert ('error' in answers[-1][0]) == (go is None)
