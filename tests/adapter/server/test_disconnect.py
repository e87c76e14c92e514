"""Clients that leave, as an ASGI application and the vision stage's futures see them."""

import asyncio
import functools
from concurrent.futures import Future

import anyio
import pytest
from fastapi import FastAPI
from lmdeploy.messages import PytorchEngineConfig
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.openai import api_server
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from waiting import HANG

from lmdeploy_vico.adapter.server import disconnect
from lmdeploy_vico.adapter.server.body import COPIES, Bounds
from lmdeploy_vico.adapter.server.disconnect import DisconnectMiddleware, while_client_waits
from lmdeploy_vico.adapter.server.served import served_request
from lmdeploy_vico.media.memory import MemoryBudget

pytestmark = pytest.mark.busy

HTTP = {'type': 'http', 'method': 'POST', 'path': '/', 'headers': [], 'asgi': {'spec_version': '2.3'}}
GONE = {'type': 'http.disconnect'}


def part(body, more=False):
    return {'type': 'http.request', 'body': body, 'more_body': more}


def middleware(app, limit=10**6):
    return DisconnectMiddleware(app, Bounds(MemoryBudget(None), limit))


class Client:
    """The server's side of a connection: sends ``body``, then waits until it is told to leave."""

    def __init__(self, *body):
        self.body = list(body)
        self.left = asyncio.Event()
        self.listeners = 0
        self.sent = []

    async def receive(self):
        if self.body:
            return self.body.pop(0)
        self.listeners += 1
        assert self.listeners == 1, 'two tasks wait for one message'
        try:
            await self.left.wait()
        finally:
            self.listeners -= 1
        return dict(GONE)

    async def send(self, message):
        self.sent.append(message)


def on_a_loop(test):
    """Run a coroutine function as a test, which is ended if it hangs."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), HANG))

    return run


async def serve(app, client, wrap=middleware):
    """Serve one request; no task is left of it."""
    before = asyncio.all_tasks()
    try:
        await wrap(app)(dict(HTTP), client.receive, client.send)
    finally:
        assert client.listeners == 0
        assert asyncio.all_tasks() == before


@on_a_loop
async def test_the_body_passes_whole():
    client = Client(part(b'one', more=True), part(b'', more=True), part(b'two'))
    seen = []

    async def app(scope, receive, send):
        seen.append(await receive())

    await serve(app, client)
    assert seen == [part(b'onetwo')]


@on_a_loop
async def test_a_body_that_is_too_large_reaches_nobody():
    client = Client(part(b'x' * 60, more=True), part(b'x' * 60, more=True))

    async def app(scope, receive, send):
        raise AssertionError

    await serve(app, client, lambda app: middleware(app, limit=100))
    start, body = client.sent
    assert start['status'] == 413 and b'more than 100 bytes' in body['body']


@on_a_loop
async def test_memory_of_the_body_is_held_until_the_answer_has_been_sent():
    budget = MemoryBudget(1000)

    async def app(scope, receive, send):
        await receive()
        assert budget.taken == 5 * COPIES

    await serve(app, Client(part(b'hello')), lambda app: DisconnectMiddleware(app, Bounds(budget, 100)))
    assert budget.taken == 0


@on_a_loop
async def test_disconnect_is_told_whenever_asked():
    client = Client(part(b'{}'))

    async def app(scope, receive, send):
        request = Request(scope, receive)
        assert await request.body() == b'{}'
        for _ in range(3):
            assert not await request.is_disconnected()
        with anyio.move_on_after(0) as waiting:
            await receive()
        assert waiting.cancelled_caught  # and the listening has gone on:
        client.left.set()
        assert await receive() == GONE
        assert await receive() == GONE
        assert await request.is_disconnected()
        assert await Request(scope, receive).is_disconnected()

    await serve(app, client)


@on_a_loop
async def test_client_gone_during_the_upload():
    async def app(scope, receive, send):
        raise AssertionError

    await serve(app, Client(part(b'half', more=True), dict(GONE)))


@on_a_loop
async def test_other_scopes_are_untouched():
    async def receive():
        raise AssertionError

    async def app(*arguments):
        assert served_request() is None
        seen.append(arguments)

    for kind in ('lifespan', 'websocket'):
        seen = []
        arguments = ({'type': kind}, receive, receive)
        await middleware(app)(*arguments)
        assert seen == [arguments]


@on_a_loop
async def test_failures_pass():
    class BrokenError(Exception):
        pass

    async def broken():
        raise BrokenError

    async def failing(scope, receive, send):
        await receive()
        raise BrokenError

    async def asking(scope, receive, send):
        await receive()
        await receive()

    with pytest.raises(BrokenError):
        await serve(failing, Client(part(b'')))
    client = Client(part(b''))
    client.left.wait = broken
    with pytest.raises(BrokenError):
        await serve(asking, client)


@pytest.mark.parametrize(
    'wrap',
    [middleware, lambda app: api_server.ConcurrencyLimitMiddleware(middleware(app), 4)],
    ids=['alone', 'under BaseHTTPMiddleware'],
)
class TestVisionWork:
    """What the client's leaving does to work that is under way for it."""

    @pytest.mark.parametrize('choices', [1, 3])
    @on_a_loop
    async def test_is_cancelled(self, wrap, choices):
        client = Client(part(b'{}'))
        futures = [Future() for _ in range(choices)]

        async def choice(future):
            with pytest.raises(RequestError) as error:
                await while_client_waits(lambda: future)
            assert error.value.code == ErrorCode.REQUEST_CANCELLED

        async def app(scope, receive, send):
            await Request(scope, receive).body()
            choosing = [asyncio.create_task(choice(future)) for future in futures]
            while len(served_request().pending) < choices:
                await asyncio.sleep(0)
            client.left.set()
            await asyncio.gather(*choosing)
            assert not served_request().pending
            await JSONResponse({}, status_code=499)(scope, receive, send)

        await serve(app, client, wrap)
        assert client.sent[0]['status'] == 499
        assert all(future.cancelled() for future in futures)

    @on_a_loop
    async def test_is_cancelled_with_what_it_waits_for(self, wrap):
        """As when the client leaves while images are decoded, or while they are encoded then."""
        client, encoding = Client(part(b'{}')), Future()

        async def prepare():
            client.left.set()
            await asyncio.wrap_future(encoding)

        async def app(scope, receive, send):
            await Request(scope, receive).body()
            with pytest.raises(RequestError, match='The client closed the connection'):
                await while_client_waits(lambda: asyncio.ensure_future(prepare()))
            await JSONResponse({}, status_code=499)(scope, receive, send)

        await serve(app, client, wrap)
        assert encoding.cancelled()

    @on_a_loop
    async def test_is_not_begun(self, wrap):
        client = Client(part(b'{}'))

        async def app(scope, receive, send):
            request = Request(scope, receive)
            await request.body()
            client.left.set()
            assert await receive() == GONE
            with pytest.raises(RequestError, match='The client closed the connection'):
                await while_client_waits(lambda: pytest.fail('work was begun'))
            await JSONResponse({})(scope, receive, send)

        await serve(app, client, wrap)

    @on_a_loop
    async def test_result_and_error(self, wrap):
        client = Client(part(b'{}'))

        async def app(scope, receive, send):
            await receive()
            future = Future()
            asyncio.get_running_loop().call_soon(future.set_result, 'tokens')
            assert await while_client_waits(lambda: future) == 'tokens'
            future = Future()
            asyncio.get_running_loop().call_soon(future.set_exception, ValueError('too large'))
            with pytest.raises(ValueError, match='too large'):
                await while_client_waits(lambda: future)
            await JSONResponse({})(scope, receive, send)

        await serve(app, client, wrap)
        assert client.sent[0]['status'] == 200

    @on_a_loop
    async def test_stream_is_ended(self, wrap):
        client = Client(part(b'{}'))
        closed = []

        async def words():
            try:
                yield 'first'
                client.left.set()
                await asyncio.Event().wait()
            finally:
                closed.append(True)

        async def app(scope, receive, send):
            await receive()
            await StreamingResponse(words())(scope, receive, send)

        await serve(app, client, wrap)
        assert closed
        assert [message['body'] for message in client.sent[1:2]] == [b'first']


@pytest.mark.parametrize('gone', [False, True])
@on_a_loop
async def test_cancelled_task_stays_cancelled(gone):
    future = Future()

    async def app(scope, receive, send):
        await receive()
        waiting = asyncio.create_task(while_client_waits(lambda: future))
        while not served_request().pending:
            await asyncio.sleep(0)
        if gone:
            served_request().abandon()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    await serve(app, Client(part(b'{}')))
    assert future.cancelled()


@on_a_loop
async def test_work_cancelled_by_others_is_no_error_of_the_client():
    future = Future()
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await while_client_waits(lambda: future)


@on_a_loop
async def test_requests_know_nothing_of_each_other():
    """Not even if the task of one starts that of the next, as servers do for requests that were sent ahead."""
    seen = []

    async def app(scope, receive, send):
        seen.append(served_request())
        if len(seen) == 1:
            await asyncio.create_task(serve_next())

    async def serve_next():
        client = Client(part(b''))
        await middleware(app)(dict(HTTP), client.receive, client.send)

    await serve_next()
    assert len(seen) == 2 and seen[0] is not seen[1]


@pytest.mark.parametrize('started', [False, True])
@pytest.mark.parametrize('by_name', [False, True])
def test_only_servers_of_vico_models_get_the_middleware(monkeypatch, started, by_name):
    monkeypatch.setattr(disconnect, '_bounds', None)
    if started:
        disconnect.watch_clients(Bounds(MemoryBudget(None), 100))
    app, config = FastAPI(), PytorchEngineConfig(enable_metrics=True)
    if by_name:
        api_server.mount_metrics(app=app, backend_config=config)
    else:
        api_server.mount_metrics(app, config)
    assert [one.cls for one in app.user_middleware] == [DisconnectMiddleware] * started
    assert app.routes[-1].path == '/metrics'
