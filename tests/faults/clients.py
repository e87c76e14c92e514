"""Clients of one server: good ones, whose answers are known, hostile ones, and those that leave."""

import asyncio
import base64
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import aiohttp

CHAT = '/v1/chat/completions'
TIMEOUT = 300  # seconds for any answer: a longer one is a hang
LONGEST_REPORT = 300  # characters of an answer in the list of faults
PATIENCE = (0.01, 0.1, 0.5, 2)  # seconds, one of which a client waits before it leaves
EVERY = 0.05  # seconds between two looks at how many answers there are
AGAIN = 0.5  # seconds until a client that was refused asks again
HEADERS = {'Content-Type': 'application/json', 'anthropic-version': '2023-06-01'}
Hostile = tuple[str, bytes] | tuple[str, bytes, str]  # its name, its body, and its path unless that is CHAT


def chat(content: object, **further: object) -> bytes:
    """Return the body of a short greedy request."""
    message = {'role': 'user', 'content': content}
    body = {'model': 'vico', 'messages': [message], 'max_tokens': 8, 'temperature': 0, 'return_token_ids': True}
    return json.dumps({**body, **further}).encode()


def with_picture(data: bytes, **further: object) -> bytes:
    """Return the body of such a request about a picture, in one tile."""
    url = 'data:image/png;base64,' + base64.b64encode(data).decode()
    content = [{'type': 'text', 'text': 'What?'}, {'type': 'image_url', 'image_url': {'url': url}}]
    return chat(content, mm_processor_kwargs={'max_dynamic_patch': 1}, **further)


async def ask(session: aiohttp.ClientSession, url: str, body: bytes, path: str = CHAT) -> tuple[int, str]:
    async with session.post(url + path, data=body, headers=HEADERS) as answer:
        return answer.status, await answer.text(errors='replace')


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TIMEOUT), connector=aiohttp.TCPConnector(limit=0, force_close=True)
    )


class GoodClients:
    """Clients that ask the same questions again and again, and compare the answers with the first ones.

    Args:
        url: of the server; called for each request, as a server that is started again has another.
        bodies: what is asked.
        count: how many clients.
        may_fail: whether a request may be refused with 503 or lose its connection, as when the server is started again.

    Attributes:
        quiet: seconds of every answer while there was no fault, for each question.
        beside: the same of those during which there was one, if only for a while.
        faults: what went wrong.
        refused: requests that failed as they may.
    """

    def __init__(self, url: Callable[[], str], bodies: list[bytes], count: int, may_fail: bool = False) -> None:
        self._url, self._bodies, self._count, self._may_fail = url, bodies, count, may_fail
        self.answers: list[str] = []
        self.quiet: list[list[float]] = [[] for _ in bodies]
        self.beside: list[list[float]] = [[] for _ in bodies]
        self.faults: list[str] = []
        self.refused: Counter[str] = Counter()
        self._ended = self._fault = False
        self._begun = 0  # faults so far

    @contextmanager
    def fault(self) -> Iterator[None]:
        """Something happens inside of this block that should do the clients no harm."""
        self._fault, self._begun = True, self._begun + 1
        try:
            yield
        finally:
            self._fault = False

    def answered(self) -> int:
        return sum(map(len, self.quiet)) + sum(map(len, self.beside))

    async def some_quiet(self, count: int) -> None:
        """Wait for so many more answers without a fault, if there is none now."""
        wanted = sum(map(len, self.quiet)) + count
        while sum(map(len, self.quiet)) < wanted:
            await asyncio.sleep(EVERY)

    async def learn(self, asked: aiohttp.ClientSession) -> None:
        """Take the answers that are given now as the right ones."""
        for body in self._bodies:
            status, text = await ask(asked, self._url(), body)
            assert status == 200, text[:LONGEST_REPORT]
            self.answers.append(self._choices(text))

    @asynccontextmanager
    async def busy(self, asked: aiohttp.ClientSession) -> AsyncIterator[None]:
        """Have all clients ask until the block ends, and wait for their last answers."""
        if not self.answers:
            await self.learn(asked)
        clients = [asyncio.create_task(self._client(asked, number)) for number in range(self._count)]
        try:
            yield
        finally:
            self._ended = True
            await asyncio.gather(*clients)

    async def _client(self, asked: aiohttp.ClientSession, number: int) -> None:
        while not self._ended:
            which = number % len(self._bodies)
            began, fault, faults = time.monotonic(), self._fault, self._begun
            try:
                status, text = await ask(asked, self._url(), self._bodies[which])
            except (aiohttp.ClientError, TimeoutError) as error:
                await self._fail(f'{type(error).__name__}')
                continue
            if status != 200:
                await self._fail(f'{status} {text[:LONGEST_REPORT]}', allowed=status == 503)
            else:
                noted = self.beside if fault or faults != self._begun else self.quiet
                noted[which].append(time.monotonic() - began)
                if self._choices(text) != self.answers[which]:
                    self.faults.append(f'another answer to question {which}: {text[:LONGEST_REPORT]}')
            number += 1

    async def _fail(self, what: str, allowed: bool = True) -> None:
        """Note it, and let the server come back before the next try, as clients do."""
        if self._may_fail and allowed:
            self.refused[what] += 1
            await asyncio.sleep(AGAIN)
        else:
            self.faults.append(f'a good request: {what}')

    @staticmethod
    def _choices(text: str) -> str:
        return json.dumps(json.loads(text)['choices'])


class HostileClients:
    """Clients that send what a server has to refuse, or to answer, without harm.

    Attributes:
        statuses: how often each was answered.
        faults: what went wrong.
    """

    def __init__(self, url: str, count: int) -> None:
        self._url, self._count = url, count
        self.statuses: Counter[int] = Counter()
        self.faults: list[str] = []

    async def send(self, asked: aiohttp.ClientSession, hostile: Iterable[Hostile]) -> None:
        """Send all of them, a few at a time."""
        waiting = iter(hostile)

        async def client() -> None:
            for name, *request in waiting:
                await self._send(asked, name, *request)

        await asyncio.gather(*(client() for _ in range(self._count)))

    async def _send(self, asked: aiohttp.ClientSession, name: str, body: bytes, path: str = CHAT) -> None:
        try:
            status, text = await ask(asked, self._url, body, path)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.faults.append(f'{name}: {type(error).__name__} {error}')
            return
        self.statuses[status] += 1
        if status != 503 and status >= 500:
            self.faults.append(f'{name}: {status} {text[:LONGEST_REPORT]}')


async def leave(asked: aiohttp.ClientSession, url: str, bodies: Sequence[bytes], rng: random.Random) -> int:
    """Ask for long answers at once and close each connection at some point; return how many left before the end."""
    left = 0

    async def client(body: bytes, patience: float) -> None:
        nonlocal left
        try:
            await asyncio.wait_for(ask(asked, url, body), patience)
        except (TimeoutError, asyncio.TimeoutError):  # Python 3.10 has two of that name
            left += 1

    await asyncio.gather(*(client(body, rng.choice(PATIENCE)) for body in bodies))
    return left
