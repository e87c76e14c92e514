"""A rank that Ray runs is killed under requests: every client is told, the server ends, and nothing is left.

For the ``mp`` executor tests/serving/lifecycle/test_end.py does the same.
"""

import psutil
import pytest
from serving.client import Client
from serving.lifecycle.test_end import Asked, body
from tp import processes
from waiting import HANG

pytestmark = [pytest.mark.tp, pytest.mark.server]


def test_a_rank_is_killed(serve_ranks, make_checkpoint):
    server = serve_ranks(make_checkpoint(), '--tp', '2', '--distributed-executor-backend', 'ray')
    below = psutil.Process(server.pid).children(recursive=True)
    client = Client(server)
    streaming, waiting = (Asked(server, body(client, stream)) for stream in (True, False))
    assert streaming.begun.wait(HANG)
    processes.ranks(server.pid, 'ray')[-1].kill()
    for one in (streaming, waiting):
        one.join(HANG)
    assert waiting.status == 503
    assert '"code": 503' in streaming.text and streaming.text.rstrip().endswith('[DONE]')
    assert server.wait_until_ended() == 1
    assert "Ray's worker of rank 1 has ended: the engine cannot go on" in server.log_text()
    processes.require_ended(below)
