"""What a server does before it ends."""

import asyncio
from types import SimpleNamespace

import pytest

from lmdeploy_vico.adapter.server.lifecycle.middleware import LifecycleMiddleware
from lmdeploy_vico.adapter.server.lifecycle.state import EXIT_STATUS, Lifecycle

POST = {'type': 'http', 'method': 'POST', 'path': '/v1/chat/completions', 'headers': []}


def server():
    return SimpleNamespace(config=SimpleNamespace(timeout_graceful_shutdown=None))


async def answered(lifecycle, scope=POST):
    """What a client is told: the status, and when to try again; None where the application was asked."""
    sent = []

    async def app(scope, receive, send):
        pass

    async def send(message):
        sent.append(message)

    await LifecycleMiddleware(app, lifecycle)(dict(scope), None, send)
    return (sent[0]['status'], dict(sent[0]['headers']).get(b'retry-after')) if sent else None


def test_a_server_without_requests_stops_at_once():
    async def run():
        lifecycle, stopped = Lifecycle(10, exits=True), []
        lifecycle.attach()
        lifecycle.stop(server(), lambda: stopped.append(True))
        assert stopped

    asyncio.run(run())
    lifecycle, stopped = Lifecycle(10, exits=True), []
    lifecycle.stop(server(), lambda: stopped.append(True))  # before it serves
    assert stopped


def test_running_requests_are_answered_and_new_ones_refused():
    async def run():
        lifecycle, stopped, uvicorn = Lifecycle(10**6, exits=True), [], server()
        lifecycle.attach()
        assert await answered(lifecycle) is None
        with lifecycle.request(), lifecycle.request():
            lifecycle.stop(uvicorn, lambda: stopped.append(True))
            await asyncio.sleep(0)
            assert await answered(lifecycle) == (503, b'5')
            assert await answered(lifecycle, {**POST, 'method': 'GET', 'path': '/health'}) == (503, b'5')
            assert await answered(lifecycle, {**POST, 'method': 'GET', 'path': '/metrics'}) is None
            assert not stopped
        while not stopped:
            await asyncio.sleep(0)
        assert uvicorn.config.timeout_graceful_shutdown is None

    asyncio.run(run())


def test_a_request_that_takes_longer_ends_without_an_answer():
    async def run():
        lifecycle, stopped, uvicorn = Lifecycle(0.01, exits=True), asyncio.Event(), server()
        lifecycle.attach()
        with lifecycle.request():
            lifecycle.stop(uvicorn, stopped.set)
            await stopped.wait()
        assert uvicorn.config.timeout_graceful_shutdown == 0

    asyncio.run(run())


def test_a_second_signal_waits_for_nothing():
    async def run():
        lifecycle, stopped = Lifecycle(10**6, exits=True), []
        lifecycle.attach()
        with lifecycle.request():
            lifecycle.stop(server(), lambda: stopped.append('first'))
            lifecycle.stop(server(), lambda: stopped.append('second'))
        assert stopped == ['second']

    asyncio.run(run())


@pytest.mark.parametrize('exits', [True, False])
def test_the_engine_dies(exits):
    async def run():
        left = []
        lifecycle = Lifecycle(10**6, exits, left.append)
        lifecycle.attach()
        with lifecycle.request():
            lifecycle.engine_died()
            lifecycle.engine_died()
            assert await answered(lifecycle) == (503, b'5')
            assert left == []  # whoever waits is told first
        if lifecycle._ending is not None:
            await lifecycle._ending
        assert left == [EXIT_STATUS] * exits

    asyncio.run(run())


def test_an_engine_that_is_closed_has_not_died():
    async def run():
        lifecycle = Lifecycle(10, exits=True, leave=pytest.fail)
        lifecycle.attach()
        lifecycle.stop(server(), lambda: None)
        lifecycle.engine_died()
        assert not lifecycle.dead and lifecycle._ending is None

    asyncio.run(run())
