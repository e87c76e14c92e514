"""Hostile requests do a server no harm; VICO_FAULTS says how many of each kind (100 unless given)."""

import asyncio
import base64
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp
import psutil
import pytest

from faults.bodies import hostile_bodies
from faults.mutations import mutated, originals
from faults.schema import schema_bodies
from lmdeploy_vico.launch import ApiServer

pytestmark = [pytest.mark.server, pytest.mark.faults]
COUNT = int(os.environ.get('VICO_FAULTS', '100'))
CLIENTS = 8  # hostile requests at once
TIMEOUT = 60  # seconds for any answer: a longer one is a hang
LONGEST_REPORT = 300  # characters of an answer in the list of faults
SESSION_LEN = '2048'  # tokens: a request for as many as there is room for ends soon
BETWEEN = 100  # hostile requests between two known good ones
PATH = '/v1/chat/completions'


def chat(model: str, content: object) -> bytes:
    """Return the body of a short greedy request."""
    message = {'role': 'user', 'content': content}
    return json.dumps(
        {'model': model, 'messages': [message], 'max_tokens': 8, 'temperature': 0, 'return_token_ids': True}
    ).encode()


def with_picture(model: str, data: bytes) -> bytes:
    url = 'data:image/png;base64,' + base64.b64encode(data).decode()
    return chat(model, [{'type': 'text', 'text': 'What?'}, {'type': 'image_url', 'image_url': {'url': url}}])


class Attack:
    """Sends hostile requests and keeps what went wrong."""

    def __init__(self, session: aiohttp.ClientSession, good: list[bytes]) -> None:
        self.session, self.good = session, good
        self.faults: list[str] = []
        self.statuses: Counter[int] = Counter()

    async def ask(self, body: bytes, path: str = PATH) -> tuple[int, str]:
        headers = {'Content-Type': 'application/json', 'anthropic-version': '2023-06-01'}
        async with self.session.post(path, data=body, headers=headers) as answer:
            return answer.status, await answer.text(errors='replace')

    async def good_answers(self) -> list[str]:
        """Return the messages of the known good requests."""
        messages = []
        for body in self.good:
            status, text = await self.ask(body)
            assert status == 200, text[:LONGEST_REPORT]
            messages.append(json.dumps(json.loads(text)['choices']))
        return messages

    async def _hostile(self, name: str, body: bytes, path: str = PATH) -> None:
        try:
            status, text = await self.ask(body, path)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.faults.append(f'{name}: {type(error).__name__} {error}')
            return
        self.statuses[status] += 1
        if status != 503 and status >= 500:
            self.faults.append(f'{name}: {status} {text[:LONGEST_REPORT]}')

    async def run(self, hostile: list[tuple]) -> None:
        first = await self.good_answers()
        for start in range(0, len(hostile), BETWEEN):
            batch = iter(hostile[start : start + BETWEEN])

            async def client(batch=batch) -> None:
                for request in batch:
                    await self._hostile(*request)

            await asyncio.gather(*(client() for _ in range(CLIENTS)))
            assert await self.good_answers() == first, f'Another answer after {start + BETWEEN} hostile requests'


async def attack(server: ApiServer, hostile_of, picture: bytes) -> Attack:
    limit = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(server.url, timeout=limit) as session:
        async with session.get('/v1/models') as answer:
            model = (await answer.json())['data'][0]['id']
        made = Attack(session, [chat(model, 'Name a colour.'), with_picture(model, picture)])
        await made.run(list(hostile_of(model)))
        return made


def processes(server: ApiServer) -> set[int]:
    return {server.pid, *(one.pid for one in psutil.Process(server.pid).children(recursive=True))}


@pytest.fixture(scope='module')
def server(make_checkpoint, tmp_path_factory):
    log = Path(tmp_path_factory.mktemp('faults')) / 'server.log'
    environment = {'LMDEPLOY_VICO_MAX_DECODED_BYTES': str(2**29)}
    with ApiServer(make_checkpoint(), '--session-len', SESSION_LEN, log=log, environment=environment) as started:
        yield started


@pytest.fixture(scope='module')
def files(pictures):
    return originals(pictures['coffee'].resize((96, 64)))


@pytest.mark.parametrize('kind', ['pictures', 'bodies', 'schema'])
def test_hostile_requests_do_no_harm(server, files, kind):
    def hostile(model: str):
        if kind == 'bodies':
            return hostile_bodies(model, COUNT, seed=12)
        if kind == 'schema':
            return schema_bodies(server.url, model, COUNT)
        return ((name, with_picture(model, data)) for name, data in mutated(files, COUNT, seed=12))

    start = time.monotonic()
    done = asyncio.run(attack(server, hostile, files['PNG']))
    memory = sum(psutil.Process(pid).memory_info().rss for pid in processes(server)) / 2**20
    seconds = time.monotonic() - start
    sys.stdout.write(f'\n{kind}: {COUNT} in {seconds:.0f} s, {dict(done.statuses)}, RSS afterwards {memory:.0f} MiB\n')
    assert server.alive()
    assert not done.faults, '\n'.join(done.faults)
