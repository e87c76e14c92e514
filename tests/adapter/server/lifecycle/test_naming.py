"""Ids of requests: whose they are, where they appear."""

import asyncio
import logging
import re

import pytest

from lmdeploy_vico import log
from lmdeploy_vico.adapter.server.lifecycle.naming import NamingMiddleware
from lmdeploy_vico.media.options import PictureOptions
from lmdeploy_vico.media.workers.worker import Job
from lmdeploy_vico.stage.queue import PendingPrompt


def serve(given, status=200, own=()):
    """The headers of an answer, and the ids that work for it sees."""
    sent, seen = [], []

    async def app(scope, receive, send):
        seen.append(PendingPrompt([], [], 0).request)
        seen.append(Job(b'', PictureOptions(), None, None, 1.0).request)
        await send({'type': 'http.response.start', 'status': status, 'headers': list(own)})
        await send({'type': 'http.response.body', 'body': b''})

    async def send(message):
        sent.append(message)

    headers = [] if given is None else [(b'x-request-id', given)]
    scope = {'type': 'http', 'method': 'POST', 'path': '/v1/chat/completions', 'headers': headers}
    asyncio.run(NamingMiddleware(app)(scope, None, send))
    assert log.request_id.get() == ''
    [name] = [value for key, value in sent[0]['headers'] if key == b'x-request-id']
    assert set(seen) == {name.decode()}
    return name


@pytest.mark.parametrize(
    'given', [b'a', b'3f2c9a10-0b1e-4d55-8f00-0a0b0c0d0e0f', b'x' * 128, b'Root=1-67891233-abcdef/7']
)
def test_the_clients_id_is_kept(given):
    assert serve(given) == given


@pytest.mark.parametrize(
    'given', [None, b'', b'x' * 129, b'two words', b'line\nfeed', b'\x1b[31m', b'[bracket]', '\u00e9'.encode()]
)
def test_another_is_made_up(given):
    first, second = serve(given), serve(given)
    assert re.fullmatch(rb'[0-9a-f]{32}', first) and first != second


def test_there_is_one_id():
    assert serve(b'mine', own=[(b'X-Request-Id', b'other'), (b'a', b'b')]) == b'mine'


def test_other_connections_pass():
    passed = []

    async def app(scope, receive, send):
        passed.append(scope)

    asyncio.run(NamingMiddleware(app)({'type': 'lifespan'}, None, None))
    assert passed == [{'type': 'lifespan'}]


@pytest.mark.parametrize('status, lines', [(200, 0), (400, 0), (500, 1), (503, 1)])
def test_a_failure_of_the_server_is_logged(caplog, status, lines):
    with caplog.at_level(logging.WARNING):
        serve(b'mine', status)
    assert [record.getMessage() for record in caplog.records] == [f'POST /v1/chat/completions: status {status}'] * lines
