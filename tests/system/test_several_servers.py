"""Two real servers behind the shipped HAProxy: one is killed, one is busy, both are, pictures come again."""

import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import aiohttp
import numpy as np
import pytest
from parity.conversations import data_url
from PIL import Image
from ports import free_port
from serving.client import Client
from system.balancer import CHAT, NAMES, asking, balancer, picture, post, until
from waiting import HANG

from lmdeploy_vico.checkpoints.random import make_tiny_checkpoint
from lmdeploy_vico.launch import ApiServer

pytestmark = [pytest.mark.system, pytest.mark.server]

CLIENTS = 200
PICTURES = 24
TOKENS = 4
CALM_CLIENTS = 8
QUEUE = 128  # tiles; until its picture is decoded, a request holds TILES of them, so calm clients never fill it
ATTEMPTS = 3  # to ask while a server is busy; nobody says how long a neighbour takes all cores
IMAGES, TILES = 40, 13  # of the request that keeps a server busy, and of each of these
JSON = {'Content-Type': 'application/json'}
OPTIONS = {'max_tokens': TOKENS, 'temperature': 0, 'ignore_eos': True}


def noise(seed):
    """The data URL of a picture of one tile that nobody has sent before."""
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8)
    return data_url(Image.fromarray(pixels).resize((448, 448), Image.Resampling.NEAREST))


class Servers:
    """Two servers of one checkpoint, and HAProxy before them."""

    def __init__(self, folder):
        self._checkpoint, self._folder = make_tiny_checkpoint(folder / 'tiny'), folder
        self.running = [self._server(name) for name in NAMES[:2]]
        self.balancer = balancer(folder, *(server.port for server in self.running))

    def _server(self, log, port=0):
        environment = {'LMDEPLOY_VICO_MAX_QUEUED_TILES': str(QUEUE)}
        arguments = '--model-name', 'vico', '--max-batch-size', '16', '--num-gpu-blocks', '2048'
        log = self._folder / f'{log}.log'
        return ApiServer(self._checkpoint, *arguments, log=log, environment=environment, timeout=HANG, port=port)

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [server.stop() for server in self.running])
            for server in self.running:
                server.start()
            for server in self.running:
                server.wait_until_ready()
            stack.enter_context(self.balancer)
            self._stack = stack.pop_all()
        self.url = self.balancer.url
        return self

    def __exit__(self, *error):
        self._stack.close()

    def kill(self, number):
        """End a server and all its processes, whose connections the kernel closes.

        A machine that loses its power closes none; that is not tested.
        """
        os.killpg(self.running[number].pid, signal.SIGKILL)
        self.running[number].stop()

    def restart(self, number):
        """Start it again, at its address, and wait until it is ready."""
        self.running[number] = self._server('restarted', self.running[number].port)
        self.running[number].start()
        self.running[number].wait_until_ready()

    def encoded_tiles(self):
        """How many tiles both have encoded."""
        return sum(Client(server).encoded_tiles() for server in self.running)


@pytest.fixture(scope='module')
def servers(tmp_path_factory):
    with Servers(tmp_path_factory.mktemp('servers')) as running:
        yield running


# ---- Pictures come again ----


def chat(url, **extra):
    return CHAT, {'model': 'vico', **asking(picture(url)), **OPTIONS, **extra}


def responses_form(url):
    return CHAT, {'model': 'vico', **asking({'type': 'input_image', 'image_url': url}), **OPTIONS}


def messages(url):
    source = {'type': 'base64', 'media_type': 'image/png', 'data': url.partition(',')[2]}
    return '/v1/messages', {'model': 'vico', **asking({'type': 'image', 'source': source}), 'max_tokens': TOKENS}


def generate(url):
    return '/generate', {'prompt': 'What is this?', 'image_data': url, **OPTIONS}


def ask(servers, path, body):
    """The name of the server that answers."""
    status, headers, told = post(servers.url + path, body, **{'anthropic-version': '2023-06-01'})
    assert status == 200, told
    return headers['X-Served-By']


def test_pictures_that_come_again_are_encoded_once(servers, record_property):
    urls = [noise(1000 + number) for number in range(40)]
    before = servers.encoded_tiles()
    rounds = []
    with ThreadPoolExecutor(CALM_CLIENTS) as pool:
        for form in (chat, responses_form, messages, generate, chat):
            order = random.Random(len(rounds)).sample(range(len(urls)), len(urls))
            names = pool.map(lambda number, form=form: ask(servers, *form(urls[number])), order)
            rounds.append(dict(zip(order, names, strict=True)))
    tiles = len(urls)
    encoded = servers.encoded_tiles() - before
    record_property('tiles', f'{encoded} encoded of {tiles} that differ, {len(rounds)} times each')
    assert tiles <= encoded < 1.05 * tiles
    assert all(placed == rounds[0] for placed in rounds)
    assert min(list(rounds[0].values()).count(name) for name in NAMES[:2]) > len(urls) / 5


# ---- Busy servers ----


@contextlib.contextmanager
def busy(servers, *numbers):
    """Keep servers busy with tiles, until the end at most; yields what says whether they all still are."""
    with contextlib.ExitStack() as stack:
        goals = []
        for number in numbers:
            server = servers.running[number]
            client = Client(server)
            tiles = client.encoded_tiles()
            small = [data_url(Image.fromarray(one)) for one in _small(tiles + number)]
            body = {'model': 'vico', **asking(*map(picture, small)), 'max_tokens': 1}
            goals.append((client, tiles + IMAGES * TILES))
            connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=HANG)
            stack.enter_context(contextlib.closing(connection)).request('POST', CHAT, json.dumps(body), JSON)
            until(lambda client=client, tiles=tiles: client.encoded_tiles() > tiles)
        yield lambda: all(client.encoded_tiles() < goal for client, goal in goals)


def _small(seed):
    return np.random.default_rng(seed).integers(0, 256, (IMAGES, 30, 40, 3), dtype=np.uint8)


def test_another_server_answers_for_a_busy_one(servers):
    urls = [noise(2000 + number) for number in range(16)]
    own = [url for url in urls if ask(servers, *chat(url)) == 'one'][:4]
    for _ in range(ATTEMPTS):
        with busy(servers, 0) as still_busy:
            names = [ask(servers, *chat(url)) for url in own]
            was_busy = still_busy()
        if was_busy:
            break
    assert was_busy and own and set(names) == {'two'}


def test_both_are_busy(servers):
    url = noise(3000)
    for _ in range(ATTEMPTS):
        with busy(servers, 0, 1) as still_busy:
            status, headers, told = post(servers.url + CHAT, chat(url)[1])
            was_busy = still_busy()
        if was_busy:
            break
    assert was_busy and (status, headers['Retry-After']) == (503, '1')
    assert 'tiles are waiting' in json.loads(told)['message']


# ---- A server is killed and restarted ----


@dataclass(frozen=True)
class Outcome:
    """What a client got: the whole answer's text, a refusal with Retry-After, or a stream that ended early."""

    kind: str  # answer, refusal, event, cut
    text: str = ''
    server: str = ''


async def attempt(session, url, body):
    """Ask once; anything that is not promised raises, a connection that HAProxy refuses among it.

    Where a stream is cut before the client has read its headers, the kernel may drop them with the connection.
    """
    try:
        async with session.post(url + CHAT, json=body) as response:
            return await outcome_of(response, body['stream'])
    except aiohttp.ClientConnectorError:
        raise  # a kind of ClientOSError, but nothing has been cut
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
        return Outcome('cut')


def test_a_balancer_that_refuses_has_cut_nothing():
    async def ask_nobody():
        async with aiohttp.ClientSession() as session:
            await attempt(session, f'http://127.0.0.1:{free_port()}', {'stream': False})

    with pytest.raises(aiohttp.ClientConnectorError):
        asyncio.run(ask_nobody())


async def outcome_of(response, stream):
    """What a response turns out to be; raises ClientPayloadError where it is cut."""
    if response.status == 503:
        assert int(response.headers['Retry-After']) > 0
        return Outcome('refusal')
    assert response.status == 200, await response.text()
    name = response.headers['X-Served-By']
    if not stream:
        answer = await response.json()
        return Outcome('answer', answer['choices'][0]['message']['content'], name)
    text = ''
    async for line in response.content:
        if line.strip() == b'data: [DONE]':
            return Outcome('answer', text, name)
        if line.startswith(b'data: '):
            event = json.loads(line[6:])
            if 'choices' not in event:
                return Outcome('event')
            text += (event['choices'] or [{'delta': {}}])[0]['delta'].get('content') or ''
    raise AssertionError('a stream ended without saying so')


async def keep_asking(url, bodies, change):
    """Ask with all clients, again and again, while ``change`` goes on in a thread; every outcome with its body."""
    outcomes, changed = [], asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=HANG)
    # Each request on a connection of its own: one that is kept may be closed just when the next request is sent.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def client(number):
            chosen = random.Random(number)
            last = False
            while not last:
                last = changed.is_set()
                body = chosen.choice(bodies)
                outcomes.append((body, await attempt(session, url, body)))

        clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
        while len(outcomes) < CLIENTS and not any(one.done() for one in clients):
            await asyncio.sleep(0.05)
        await asyncio.to_thread(change)
        changed.set()
        await asyncio.gather(*clients)
    return outcomes


def test_a_server_is_killed_and_restarted_under_load(servers, record_property):
    bodies = [chat(noise(4000 + one), stream=bool(one % 2))[1] for one in range(PICTURES)]
    expected = {}
    for one, body in enumerate(bodies):
        _, _, told = post(servers.url + CHAT, body | {'stream': False})
        expected[one] = json.loads(told)['choices'][0]['message']['content']

    def change():
        servers.kill(0)
        servers.restart(0)

    outcomes = asyncio.run(keep_asking(servers.url, bodies, change))
    counts = {kind: sum(one.kind == kind for _, one in outcomes) for kind in ('answer', 'refusal', 'event', 'cut')}
    log = servers.balancer.log.read_text()
    retried = sum('/+' in line for line in log.splitlines())
    begun = log.count(' SD-- ')  # answers that the server had begun when it ended
    record_property('outcomes', f'{len(outcomes)} requests: {counts}; {retried} sent again to another server')
    for body, outcome in outcomes:
        assert outcome.kind != 'answer' or outcome.text == expected[bodies.index(body)]
    assert counts['answer'] > CLIENTS and retried and counts['cut'] <= begun
    # The restarted one has its share again.
    until(lambda: {ask(servers, CHAT, body) for body in bodies} == set(NAMES[:2]))
