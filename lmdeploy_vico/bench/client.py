"""A closed loop of streaming requests: so many at a time, each timed to its first token.

On aiohttp and bytes rather than on the openai package, which builds a pydantic object of every event and encodes every
body while the clock runs: on the cores that the server uses as well, that would be measured with it.
"""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from lmdeploy_vico.bench import BenchError

PREFIX = b'data: '
ENGINE_ENDED = 'inference engine is unavailable'  # what LMDeploy answers from then on
LINE_LIMIT = 2**20  # bytes of a line of the answer
LOOK_TIMEOUT = 30  # seconds for anything that is not a measured request


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        ttft: seconds from sending it to the first event that carries a token or ends the answer; NaN if it failed.
        prompt_tokens: from the server's usage, as the next two.
        image_tokens: visual tokens among them; None if the server does not say.
        cached_tokens: of the prompt, found in the prefix cache.
        error: why it failed, in a sentence; None if it did not.
        status: of the HTTP answer; 0 if there was none.
    """

    ttft: float = math.nan
    prompt_tokens: int = 0
    image_tokens: int | None = None
    cached_tokens: int = 0
    error: str | None = None
    status: int = 0


@dataclass(frozen=True)
class Round:
    """Outcomes of requests sent in one closed loop that took ``duration`` seconds.

    Attributes:
        gave_up: whether sending stopped early, as nothing was answered any more.
    """

    duration: float
    outcomes: list[Outcome]
    gave_up: bool


class Client:
    """One server. An asynchronous context manager."""

    def __init__(self, url: str, timeout: float = 600) -> None:
        self.url = url.rstrip('/').removesuffix('/v1')
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    async def __aenter__(self) -> 'Client':
        connector = aiohttp.TCPConnector(limit=0)  # the closed loop is the limit
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, read_bufsize=LINE_LIMIT)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def model(self) -> str:
        """The name of the model; raises :class:`BenchError` where no OpenAI server answers."""
        try:
            answer = json.loads(await self._look('/v1/models'))
            name: str = answer['data'][0]['id']
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, OSError) as error:
            raise BenchError(
                f'No server answers at {self.url} ({_name(error)}): check --base-url, which begins with http://.'
            ) from error
        except (KeyError, IndexError, TypeError) as error:
            raise BenchError(f'{self.url} is not an OpenAI server: /v1/models names no model.') from error
        return name

    async def token_counts(self, texts: list[str]) -> list[int]:
        """How many tokens each text has, by LMDeploy's ``/v1/encode``."""
        try:
            body = {'input': texts, 'do_preprocess': False, 'add_bos': False}
            lengths: list[int] = json.loads(await self._look('/v1/encode', body))['length']
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError, OSError) as error:
            message = f'{self.url} does not count tokens at /v1/encode ({_name(error)}): it is not an LMDeploy server.'
            raise BenchError(message) from error
        return lengths

    async def metrics(self) -> str:
        """What ``/metrics`` says; nothing if there is no such page."""
        try:
            return await self._look('/metrics')
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return ''

    async def ended(self, outcomes: Iterable[Outcome]) -> bool:
        """Whether the server or its engine is gone; LMDeploy's ``/health`` stays well after its engine has ended."""
        if any(outcome.error and ENGINE_ENDED in outcome.error for outcome in outcomes):
            return True
        try:
            await self._look('/health')
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return True
        return False

    async def _look(self, path: str, body: Any = None) -> str:
        method = 'GET' if body is None else 'POST'
        timeout = aiohttp.ClientTimeout(total=LOOK_TIMEOUT)
        async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
            response.raise_for_status()
            return await response.text()

    async def ask(self, body: bytes) -> Outcome:
        """Send one request and read its answer to the end. Never raises for what the server does."""
        headers = {'Content-Type': 'application/json'}
        began = time.perf_counter()
        try:
            async with self._session.post(f'{self.url}/v1/chat/completions', data=body, headers=headers) as response:
                if response.status != 200:
                    return Outcome(error=error_sentence(await response.text(), response.status), status=response.status)
                return await _read(response, began)
        except asyncio.TimeoutError:  # Python 3.10 has another of that name
            return Outcome(error='The server did not answer in time.')
        except (aiohttp.ClientError, OSError) as error:
            return Outcome(error=f'The connection was lost ({_name(error)}).')
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Outcome(error=f'The answer is not what an OpenAI server sends ({_name(error)}).', status=200)

    async def round(
        self, bodies: Iterable[bytes], concurrency: int, done: Callable[[], object] = lambda: None
    ) -> Round:
        """Send all of ``bodies``, ``concurrency`` at a time; ends early after as many failures in a row.

        Args:
            done: called after every request.
        """
        waiting: Iterator[bytes] = iter(bodies)
        outcomes: list[Outcome] = []
        failed_in_a_row = 0

        async def work() -> None:
            nonlocal failed_in_a_row
            for body in waiting:
                outcome = await self.ask(body)
                outcomes.append(outcome)
                failed_in_a_row = failed_in_a_row + 1 if outcome.error else 0
                done()
                if failed_in_a_row >= max(concurrency, 2):
                    return

        began = time.perf_counter()
        await _all(work() for _ in range(concurrency))
        return Round(time.perf_counter() - began, outcomes, failed_in_a_row >= max(concurrency, 2))


async def _all(works: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*works)


async def _read(response: aiohttp.ClientResponse, began: float) -> Outcome:
    ttft, usage, error = math.nan, None, None
    async for line in response.content:
        if not line.startswith(PREFIX) or line.startswith(b'data: [DONE]'):
            continue
        event = json.loads(line[len(PREFIX) :])
        for choice in event.get('choices') or ():
            ttft = time.perf_counter() - began if math.isnan(ttft) else ttft
            if choice.get('finish_reason') not in (None, 'length', 'stop'):
                error = f'The answer ended with finish_reason "{choice["finish_reason"]}".'
        error = error or (error_sentence(line[len(PREFIX) :].decode(), 200) if 'error' in event else None)
        usage = event.get('usage') or usage
    if error or usage is None or math.isnan(ttft):
        return Outcome(error=error or 'The answer ended before it was complete.', status=200)
    details = usage.get('prompt_tokens_details') or {}
    return Outcome(
        ttft=ttft,
        prompt_tokens=usage['prompt_tokens'],
        image_tokens=details.get('image_tokens'),
        cached_tokens=details.get('cached_tokens') or 0,
        status=200,
    )


def error_sentence(text: str, status: int) -> str:
    """The sentence in an error's body."""
    try:
        answer = json.loads(text)
        said = answer.get('message') or answer['error']['message']
    except (ValueError, KeyError, TypeError, AttributeError):
        said = text.strip()[:200]
    return f'HTTP {status}: {said}' if said else f'HTTP {status}.'


def _name(error: BaseException) -> str:
    return str(error) or type(error).__name__
