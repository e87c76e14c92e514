"""A stand-in for a served ViCO model, in a thread: what the benchmark's client sees of one, and what can go wrong."""

import asyncio
import json
import math
import threading
from collections.abc import Callable

import pytest
from aiohttp import web
from waiting import HANG

from lmdeploy_vico.bench.workload.requests import visual_tokens

OVERHEAD = 16  # tokens of the chat template


class FakeServer:
    """Answers as LMDeploy with the plugin does.

    Args:
        image_tokens: whether usage counts them.
        compresses: whether it does what it is asked.
        synthetic: whether synthetic images are accepted.
        dies_after: chat requests until the connection is cut and the port closed.
        engine_ends_after: chat requests until only 503 is answered.
        hold: requests that wait until so many have come.
        overhead: tokens of the chat template.
    """

    def __init__(
        self,
        image_tokens: bool = True,
        compresses: bool = True,
        synthetic: bool = True,
        dies_after: float = math.inf,
        engine_ends_after: float = math.inf,
        hold: int = 0,
        overhead: int = OVERHEAD,
    ) -> None:
        self.image_tokens, self.compresses, self.synthetic, self.overhead = (
            image_tokens,
            compresses,
            synthetic,
            overhead,
        )
        self.dies_after, self.engine_ends_after = dies_after, engine_ends_after
        self.bodies: list[dict] = []
        self.running = self.most_running = 0
        self._hold, self._all_there = hold, asyncio.Event()
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(HANG)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=2**26)
        app.add_routes(
            [
                web.get('/v1/models', self._models),
                web.get('/health', self._health),
                web.get('/metrics', self._metrics),
                web.post('/v1/encode', self._encode),
                web.post('/v1/chat/completions', self._chat),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        self._loop.run_until_complete(self._runner.setup())
        site = web.TCPSite(self._runner, '127.0.0.1', 0)
        self._loop.run_until_complete(site.start())
        self.url = f'http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}'
        self._site = site
        self._ready.set()
        self._loop.run_forever()

    def stop(self) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(HANG)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(HANG)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({'data': [{'id': 'fake-8B'}]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({'status': 'healthy'})

    async def _metrics(self, request: web.Request) -> web.Response:
        done = len(self.bodies)
        names = ('time_to_first_token', 'request_prefill_time', 'request_queue_time')
        sums = [f'lmdeploy:{name}_seconds_sum {done / 100}' for name in names]
        return web.Response(text='\n'.join(sums + [f'lmdeploy:{name}_seconds_count {done}' for name in names]))

    async def _encode(self, request: web.Request) -> web.Response:
        return web.json_response({'length': [len(text.split()) for text in (await request.json())['input']]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if len(self.bodies) > self.dies_after:
            if len(self.bodies) == self.dies_after + 1:
                await self._site.stop()
            request.transport.abort()
            return web.Response()
        if len(self.bodies) > self.engine_ends_after:
            return web.json_response({'message': 'The inference engine is unavailable.', 'code': 503}, status=503)
        images = [item['image_url'] for item in body['messages'][0]['content'] if item['type'] == 'image_url']
        text = ' '.join(item['text'] for item in body['messages'][0]['content'] if item['type'] == 'text')
        if any('synthetic' in image for image in images) and not self.synthetic:
            return web.json_response({'message': 'synthetic is no key of an image item.'}, status=400)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if self.running >= self._hold:
            self._all_there.set()
        try:
            await self._all_there.wait()
            return await self._stream(request, visual_tokens(*self._tiles(body, images)), len(text.split()))
        finally:
            self.running -= 1

    def _tiles(self, body: dict, images: list[dict]) -> tuple[int, int]:
        if 'synthetic' in images[0]:
            return images[0]['synthetic']['tiles'], images[0]['synthetic']['compressed']
        tiles = sum(image['max_dynamic_patch'] + (image['max_dynamic_patch'] > 1) for image in images)
        share = body.get('mm_processor_kwargs', {'image': {'compression': 0.0}})['image']['compression']
        share = 0.4 if share == 'auto' else share
        return tiles, round(share * tiles) if self.compresses else 0

    async def _stream(self, request: web.Request, image_tokens: int, text_tokens: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={'Content-Type': 'text/event-stream'})
        await response.prepare(request)
        usage = {
            'prompt_tokens': image_tokens + text_tokens + self.overhead,
            'prompt_tokens_details': {'cached_tokens': 0},
        }
        if self.image_tokens:
            usage['prompt_tokens_details']['image_tokens'] = image_tokens
        for event in (
            {'choices': [{'index': 0, 'delta': {'content': 'a'}}], 'usage': None},
            {'choices': [{'index': 0, 'delta': {'content': ''}, 'finish_reason': 'length'}], 'usage': None},
            {'choices': [], 'usage': usage},
        ):
            await response.write(f'data: {json.dumps(event)}\n\n'.encode())
        await response.write(b'data: [DONE]\n\n')
        return response


@pytest.fixture
def fake_server() -> Callable[..., FakeServer]:
    """``fake_server(**faults)``: a running server; all are stopped at the end of the test."""
    servers = []

    def start(**faults) -> FakeServer:
        servers.append(FakeServer(**faults))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
