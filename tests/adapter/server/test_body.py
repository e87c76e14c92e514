"""Bodies of requests: read within bounds, and counted before anything is made of them."""

import asyncio
from types import SimpleNamespace

import pytest
from lmdeploy.serve.core.exceptions import RequestError
from lmdeploy.serve.utils.server_utils import AuthenticationMiddleware

from lmdeploy_vico.adapter.server.body import (
    COPIES,
    BodyTooLargeError,
    BodyTooSlowError,
    Bounds,
    Incoming,
    Pace,
    client_of,
    read_body,
)
from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.media.memory import MemoryBudget, MemoryShare

LIMIT = 100


def read(parts, limit=LIMIT, budget=None, headers=()):
    """What is read of a body that comes in parts; None is a disconnect."""
    budget = budget or MemoryBudget(None)
    messages = [
        {'type': 'http.disconnect'} if part is None else {'type': 'http.request', 'body': part, 'more_body': True}
        for part in parts
    ]
    if messages and 'more_body' in messages[-1]:
        messages[-1]['more_body'] = False
    coming = iter(messages)

    async def receive():
        return next(coming)

    share = MemoryShare(budget)
    with share.in_use():
        found = asyncio.run(read_body(list(headers), receive, share, Bounds(budget, limit)))
        taken = budget.taken
    assert budget.taken == 0
    return found, taken, len(list(coming))


def test_a_body_in_parts():
    assert read([b'ab', b'', b'c']) == (b'abc', 3 * COPIES, 0)
    assert read([b'x' * LIMIT])[0] == b'x' * LIMIT
    assert read([b''])[0] == b''


def test_a_client_that_leaves():
    assert read([b'ab', None])[0] is None


def test_a_body_that_is_too_large_is_not_read_on():
    for parts in ([b'x' * (LIMIT + 1)], [b'x' * 60, b'x' * 60]):
        with pytest.raises(BodyTooLargeError, match=r'more than 100 bytes \(option max_body_bytes\)') as caught:
            read(parts)
        assert caught.value.status_code == 413


def test_a_length_that_is_announced_is_enough():
    with pytest.raises(BodyTooLargeError):
        read([], headers=[(b'content-length', b'101')])
    assert read([b'a'], headers=[(b'content-length', b'100')])[0] == b'a'
    assert read([b'a'], headers=[(b'content-length', b'many')])[0] == b'a'


def test_memory_of_all_requests():
    with pytest.raises(BodyTooLargeError):
        read([b'x' * 50], budget=MemoryBudget(50 * COPIES - 1))
    budget = MemoryBudget(60 * COPIES)
    other = MemoryShare(budget)
    with other.in_use():
        other.take(20 * COPIES)
        with pytest.raises(OverloadError, match='Try again later') as caught:
            asyncio.run(_read_beside(budget))
        assert isinstance(caught.value, RequestError) and caught.value.retry_after == 1


async def _read_beside(budget):
    async def receive():
        return {'type': 'http.request', 'body': b'x' * 50, 'more_body': False}

    share = MemoryShare(budget)
    with share.in_use():
        await read_body([], receive, share, Bounds(budget, LIMIT))


def test_how_long_a_body_may_take():
    pace = Pace(pause=20, head_start=60, rate=1000)
    assert pace.patience(since=0, received=0) == 20
    assert pace.patience(since=55, received=0) == 5
    assert pace.patience(since=75, received=20_000) == 5  # as fast as it has to be
    assert pace.patience(since=75, received=10_000) < 0


def test_a_body_that_does_not_arrive():
    budget = MemoryBudget(None)
    bounds = Bounds(budget, LIMIT, Pace(pause=0.01))

    async def receive():
        if not budget.taken:
            return {'type': 'http.request', 'body': b'ab', 'more_body': True}
        await asyncio.Event().wait()

    share = MemoryShare(budget)
    with share.in_use(), pytest.raises(BodyTooSlowError, match='too slowly') as caught:
        asyncio.run(read_body([], receive, share, bounds))
    assert caught.value.status_code == 408 and budget.taken == 0


def test_no_client_fills_the_memory_with_bodies_that_have_not_arrived():
    incoming = Incoming(MemoryBudget(100))
    with incoming.of('a') as alone:
        alone(90)  # what there is, for one body
    with incoming.of('a') as first, incoming.of('a') as second, incoming.of('b') as other:
        first(30)
        second(20)
        with pytest.raises(OverloadError, match='Too many bodies of this client'):
            second(1)
        other(50)
    with incoming.of('a') as again, incoming.of('a'):
        again(50)


KEYED = SimpleNamespace(user_middleware=[SimpleNamespace(cls=AuthenticationMiddleware)])
OPEN = SimpleNamespace(user_middleware=[])


@pytest.mark.parametrize(
    'app, headers, client',
    [
        (KEYED, [(b'authorization', b'Bearer a')], 'key a'),
        (KEYED, [(b'authorization', b'bEARER a'), (b'authorization', b'Bearer invented')], 'key a'),
        (KEYED, [(b'x-api-key', b'b')], '10.0.0.1'),
        (OPEN, [(b'authorization', b'Bearer invented')], '10.0.0.1'),
        (OPEN, [], '10.0.0.1'),
    ],
)
def test_clients(app, headers, client):
    assert client_of({'app': app, 'headers': headers, 'client': ('10.0.0.1', 5)}) == client


def test_a_client_without_an_address():
    assert client_of({'headers': [], 'client': None}) == ''
