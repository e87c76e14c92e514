"""A server takes as many connections as it has descriptors for."""

import asyncio
import logging
import resource
import subprocess
import sys
from types import SimpleNamespace

from lmdeploy_vico.adapter.server.lifecycle.connections import BODY, REFUSAL, ConnectionBound, bounded


def test_a_burst_leaves_descriptors():
    for free in (1, 2, 10, 900, 65000):
        bound = ConnectionBound(free)
        assert bound.most >= 1 and bound.backlog >= 1
        assert free < 10 or bound.most + 3 * bound.backlog <= free


def test_one_too_many_is_told():
    sent, closed = [], []
    transport = type('Transport', (asyncio.Transport,), {})()
    transport.write, transport.close = sent.append, lambda: closed.append(True)
    made = []

    def protocol(**kwargs):
        made.append(kwargs)
        return asyncio.Protocol()

    make = bounded(protocol, ConnectionBound(900))
    full = ConnectionBound(900).most
    for count in (0, full - 1, full, full + 1):
        one = make(config='c', server_state=SimpleNamespace(connections=set(range(count))))
        one.connection_made(transport)
    assert len(made) == 2 and made[0]['config'] == 'c' and len(closed) == 2
    assert sent == [REFUSAL % (len(BODY), BODY)] * 2 and sent[0].startswith(b'HTTP/1.1 503 ')


def test_refusals_are_logged_now_and_then(caplog):
    bound = ConnectionBound(900)
    with caplog.at_level(logging.WARNING):
        for second in range(100):
            bound.note_refusal(second / 5)
    assert [record.args[0] for record in caplog.records] == [1, 50]


def limits(soft, hard):
    """What a process with such limits of open files makes of them: its soft limit, its bound."""
    script = (
        'import resource; from lmdeploy_vico.adapter.server.lifecycle import connections; '
        f'resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); bound = connections.bound_of_this_process(); '
        'print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], bound.most, bound.backlog)'
    )
    run = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    return [int(number) for number in run.stdout.split()], run.stderr


def test_the_limit_is_raised_as_far_as_allowed():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    allowed = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    (soft, most, backlog), log = limits(256, allowed)
    assert soft == allowed and allowed / 2 < most < allowed and backlog < allowed / 8
    assert not log


def test_a_low_limit_is_told():
    (soft, most, _), log = limits(100, 100)
    assert soft == 100 and 0 < most < 60 and 'raise the limit of open files' in log
