"""A stand-in for a served ViCO model that knows what it answers, in a thread of its own."""

import asyncio
import base64
import csv
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from waiting import HANG

TILES = 2  # of a picture
TEXT = 10  # tokens of a prompt beside them
FULL, COMPRESSED = 256, 64
# Of two tiles, how many each compression leaves full.
LEFT = {'none': 2, 'auto': 1, 'all': 0, 0.5: 1}


class StandIn:
    """Answers ``answer(question, compression)``; an integer is the status of an error, a response is sent as it is.

    Attributes:
        bodies: of the requests so far.
        most_running: requests that were there at the same time.
    """

    def __init__(
        self, answer: Callable[[str, object], str | int | web.Response], image_tokens: bool = True, hold: int = 0
    ) -> None:
        self.answer, self.image_tokens, self._hold = answer, image_tokens, hold
        self.bodies: list[dict] = []
        self.running = self.most_running = 0
        self._loop, self._ready, self._all_there = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(HANG)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=2**26)
        app.add_routes([web.get('/v1/models', self._models), web.post('/v1/chat/completions', self._chat)])
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        self._loop.run_until_complete(self._runner.setup())
        site = web.TCPSite(self._runner, '127.0.0.1', 0)
        self._loop.run_until_complete(site.start())
        self.url = f'http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}'
        self._ready.set()
        self._loop.run_forever()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(HANG)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANG)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({'data': [{'id': 'stand-in'}]})

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if self.running >= self._hold:
            self._all_there.set()
        await self._all_there.wait()
        self.running -= 1
        content = body['messages'][0]['content']
        pictures = sum(item['type'] == 'image_url' for item in content)
        compression = body['mm_processor_kwargs']['image']['compression']
        said = self.answer(content[-1]['text'].splitlines()[0], compression)
        if isinstance(said, web.Response):
            return said
        if isinstance(said, int):
            return web.json_response(
                {'message': 'It is not to be.', 'code': said}, status=said, headers={'Retry-After': '0'}
            )
        left = LEFT[compression]
        tokens = pictures * (left * FULL + (TILES - left) * COMPRESSED)
        usage: dict = {'prompt_tokens': tokens + TEXT, 'prompt_tokens_details': {'cached_tokens': 0}}
        if self.image_tokens:
            usage['prompt_tokens_details']['image_tokens'] = tokens
        return web.json_response({'choices': [{'message': {'content': said}}], 'usage': usage})


@pytest.fixture
def stand_in() -> Iterator[Callable[..., StandIn]]:
    """``stand_in(answer, **how)``: a running server; all are stopped at the end of the test."""
    servers = []

    def start(answer: Callable[[str, object], str | int | web.Response], **how) -> StandIn:
        servers.append(StandIn(answer, **how))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def data_file(tmp_path) -> Callable[..., Path]:
    """``data_file(count)``: questions "question 0" and so on with a picture each, whose answers are "0" and so on."""

    def write(count: int, name: str = 'data.tsv') -> Path:
        path = tmp_path / name
        picture = base64.b64encode(bytes(100)).decode()
        with path.open('w', newline='') as file:
            writer = csv.writer(file, delimiter='\t')
            writer.writerow(['index', 'question', 'answer', 'image', 'category'])
            writer.writerows([n, f'question {n}', n, picture, 'even' if n % 2 == 0 else 'odd'] for n in range(count))
        return path

    return write
