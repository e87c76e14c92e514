"""What the benchmark of the overload valve counts, and what it refuses to count."""

import asyncio
import json
import math

import pytest

from benchmarks.serving.pressure import PressureError, Turns, _body, _check
from lmdeploy_vico.bench.client import Outcome
from lmdeploy_vico.bench.workload.requests import Requests


def test_a_summary_counts_what_was_answered():
    good = [Outcome(ttft=float(second), image_tokens=tokens) for second, tokens in ((1, 256), (2, 64), (3, 64))]
    turns = Turns(seconds=90.0, outcomes=[*good, Outcome(error='HTTP 503.', status=503)])
    summary = turns.summary()
    assert (summary['answered'], summary['failed'], summary['answered_per_minute']) == (3, 1, 2)
    assert summary['ttft_p50'] == 2 and summary['ttft_p99'] == pytest.approx(2.98)
    assert summary['image_tokens'] == 128


@pytest.mark.parametrize('outcomes', [[], [Outcome(ttft=1.0)], [Outcome(error='HTTP 500.')] * 3])
def test_hardly_any_answer_is_no_measurement(outcomes):
    with pytest.raises(PressureError, match='make the turns longer'):
        Turns(1.0, outcomes).summary()


class Server:
    """Answers with so many visual tokens."""

    def __init__(self, image_tokens):
        self._image_tokens = image_tokens

    async def ask(self, body):
        image = json.loads(body)['messages'][0]['content'][0]['image_url']
        assert image['synthetic'] == {'tiles': 10, 'seed': 0}  # the valve leaves alone what states its compression
        return Outcome(ttft=math.pi, image_tokens=self._image_tokens)


def test_a_server_that_compresses_without_pressure_is_not_measured():
    body = _body(Requests('model', 10, [], {}), 0)
    asyncio.run(_check(Server(2560), body, 10))
    with pytest.raises(PressureError, match='got 2368 visual tokens'):
        asyncio.run(_check(Server(2368), body, 10))
