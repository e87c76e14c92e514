"""Ids of requests: whose they are, where they appear."""

import asyncio
import json
import logging
import re

import pytest

from lmdeploy_vico import log
from lmdeploy_vico.adapter.server.lifecycle.naming import NamingMiddleware
from lmdeploy_vico.media.options import PictureOptions
from lmdeploy_vico.media.workers.worker import Job
from lmdeploy_vico.stage.queue import PendingPrompt


def serve(given, status=200, own=(), path='/v1/chat/completions'):
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
    scope = {'type': 'http', 'method': 'POST', 'path': path, 'headers': headers}
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
    assert [one.getMessage() for one in caplog.records] == [f"POST '/v1/chat/completions': status {status}"] * lines


def failing(path, begins):
    """What is sent to a client whose request fails with an exception that nobody expects."""
    sent = []

    async def app(scope, receive, send):
        if begins:
            await send({'type': 'http.response.start', 'status': 200, 'headers': []})
        raise KeyError('unexpected')

    async def send(message):
        sent.append(message)

    scope = {'type': 'http', 'method': 'POST', 'path': path, 'headers': [(b'x-request-id', b'mine')]}
    with pytest.raises(KeyError):  # on to uvicorn, which logs the traceback
        asyncio.run(NamingMiddleware(app)(scope, None, send))
    return sent


@pytest.mark.parametrize('path', ['/v1/chat/completions', '/v1/messages', '/v1/responses', '/vico/route'])
def test_an_exception_that_nothing_catches_is_answered_and_logged(caplog, path):
    start, body = failing(path, begins=False)
    assert (start['status'], dict(start['headers'])[b'x-request-id']) == (500, b'mine')
    assert 'An internal server error occurred.' in json.dumps(json.loads(body['body']))
    assert [one.getMessage() for one in caplog.records] == [
        f"POST '{path}': nothing has caught a KeyError",
        f"POST '{path}': status 500",
    ]


def test_an_answer_that_breaks_off_is_logged(caplog):
    [start] = failing('/generate', begins=True)
    assert start['status'] == 200
    assert [one.getMessage() for one in caplog.records] == ["POST '/generate': nothing has caught a KeyError"]


@pytest.mark.parametrize(
    'path', ['/health\n2026-01-01 CRITICAL gone', '/\x1b[2Jhealth', '/\u2028\u202e', '/' + 'x' * 10**5]
)
def test_a_path_does_not_spoil_the_log(caplog, path):
    serve(b'mine', 503, path=path)
    failing(path, begins=True)
    assert len(caplog.records) == 2
    for record in caplog.records:
        line = record.getMessage()
        assert line.isprintable() and len(line) < 200
