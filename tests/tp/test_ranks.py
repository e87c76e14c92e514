"""A rank that Ray runs is killed under requests: every client is told, health turns bad, and nothing is left.

For the ``mp`` executor tests/serving/lifecycle/test_end.py does the same.
"""

import time

import psutil
import pytest
from serving.lifecycle.test_end import Asked, ask, body
from tp import processes
from waiting import HANG

pytestmark = [pytest.mark.tp, pytest.mark.server]

POLL = 0.2  # seconds


def health(server):
    """The status of ``/health``; None once nobody answers."""
    try:
        return ask(server, '/health')[0]
    except OSError:
        return None


def test_a_rank_is_killed(serve_ranks, make_checkpoint):
    server = serve_ranks(make_checkpoint(), '--tp', '2', '--distributed-executor-backend', 'ray')
    below = psutil.Process(server.pid).children(recursive=True)
    streaming, waiting = Asked(server, body()), Asked(server, body(stream=False))
    assert streaming.begun.wait(HANG)
    processes.ranks(server.pid, 'ray')[-1].kill()
    for client in (streaming, waiting):
        client.join(HANG)
    assert waiting.status == 503
    assert '"code": 503' in streaming.text and streaming.text.rstrip().endswith('[DONE]')
    deadline = time.monotonic() + processes.ENDING
    while health(server) == 200:
        assert time.monotonic() < deadline, 'the server says that it is well'
        time.sleep(POLL)
    while server.alive() and time.monotonic() < deadline:
        assert health(server) in (503, None)
        time.sleep(POLL)
    if server.alive():
        pytest.xfail('LMDeploy keeps the server whose Ray worker has died: it answers 503 and does not end')
    assert server.wait_until_ended() == 1
    processes.require_ended(below)
