"""A server as its clients see it: through the official OpenAI client, and in plain JSON."""

import asyncio
import json
import random
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from parity.conversations import on_the_wire
from parity.judge import TOKENS, Answer
from waiting import HANG

from lmdeploy_vico.launch import ApiServer

CONCURRENCY = 16  # clients at a time


class Client:
    """A server as the official OpenAI client sees it."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        keys = server.command[server.command.index('--api-keys') + 1 :] if '--api-keys' in server.command else ['none']
        self.openai = openai.OpenAI(base_url=f'{server.url}/v1', api_key=keys[0], max_retries=0, timeout=HANG)
        self.model = self.openai.models.list().data[0].id

    def chat(self, messages: Sequence[dict], model: str | None = None, **extra: Any) -> Answer:
        """Greedy answer to messages with PIL images, through /v1/chat/completions."""
        completion = self.openai.chat.completions.create(
            model=model or self.model,
            messages=on_the_wire(messages),
            max_tokens=TOKENS,
            temperature=0,
            extra_body={'return_token_ids': True, 'ignore_eos': True, **extra},
        )
        usage = completion.usage
        token_ids = completion.choices[0].model_extra['output_ids']
        return Answer(tuple(token_ids), usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens)

    def metric(self, name: str) -> float:
        """The value of a metric without labels on ``/metrics``."""
        with urllib.request.urlopen(f'{self.server.url}/metrics', timeout=HANG) as response:
            text = response.read().decode()
        return float(re.search(rf'^{re.escape(name)} (\S+)$', text, re.MULTILINE)[1])

    def encoded_tiles(self) -> int:
        """How many tiles the vision stage has given to its device so far."""
        return int(self.metric('vico:encoder_tiles_per_batch_sum'))


def post(client: Client, path: str, body: dict, **headers: str) -> tuple[int, dict]:
    """POST JSON; returns the status and the decoded body."""
    request = urllib.request.Request(
        client.server.url + path,
        json.dumps(body).encode(),
        {'Content-Type': 'application/json', 'anthropic-version': '2023-06-01', **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=HANG) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def send(client: Client, path: str, body: dict) -> socket.socket:
    """Send a request and return its socket."""
    payload = json.dumps(body).encode()
    lines = [
        f'POST {path} HTTP/1.1',
        'Host: localhost',
        'Content-Type: application/json',
        'anthropic-version: 2023-06-01',
        f'Content-Length: {len(payload)}',
    ]
    connection = socket.create_connection(('127.0.0.1', client.server.port), timeout=HANG)
    connection.sendall('\r\n'.join([*lines, '', '']).encode() + payload)
    return connection


def stream(client: Client, path: str, body: dict) -> list[dict]:
    """The decoded events of a streamed answer."""
    request = urllib.request.Request(
        client.server.url + path, json.dumps(body | {'stream': True}).encode(), {'Content-Type': 'application/json'}
    )
    with urllib.request.urlopen(request, timeout=HANG) as response:
        lines = [line.decode().strip() for line in response]
    events = [line.removeprefix('data: ') for line in lines if line.startswith('data: ')]
    assert events[-1] == '[DONE]'
    return [json.loads(event) for event in events[:-1]]


def chat(client: Client, *items: dict, text: str = 'What is this?', **extra: Any) -> tuple[int, dict]:
    """Ask in plain JSON; returns the status and the decoded body."""
    content = [{'type': 'text', 'text': text}, *items]
    body = {
        'model': client.model,
        'messages': [{'role': 'user', 'content': content}],
        'max_tokens': TOKENS,
        'temperature': 0,
        'return_token_ids': True,
        'ignore_eos': True,
    }
    return post(client, '/v1/chat/completions', body | extra)


def image_item(url: Any, **params: Any) -> dict:
    return {'type': 'image_url', 'image_url': {'url': url, **params}}


def message(body: Mapping[str, Any]) -> str:
    """What an endpoint says of a request that it has refused, in either of LMDeploy's forms."""
    return str((body.get('error') or body)['message'])


def generate(client: Client, **body: Any) -> tuple[int, dict]:
    """Ask ``/generate``; returns the status and the decoded body."""
    return post(client, '/generate', {'max_tokens': TOKENS, 'temperature': 0, 'ignore_eos': True, **body})


def check_alone_and_together(client: Client, prompts: Mapping[str, list], check: Callable[..., None]) -> None:
    """Ask for every prompt alone, then twice for some among others, and have each answer judged."""
    for name, messages in prompts.items():
        check(messages, client.chat(messages), name=name)
    order = random.Random(7)
    for _ in range(2):
        names = order.choices(list(prompts), k=CONCURRENCY)
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = list(pool.map(lambda name: client.chat(prompts[name]), names))
        for name, answer in zip(names, answers, strict=True):
            check(prompts[name], answer, name=name)


class PeakMemory:
    """Bytes that the server, without its engine, takes at most from now on, above what it takes now."""

    def __init__(self, client: Client) -> None:
        self._process = Path(f'/proc/{client.server.pid}')
        (self._process / 'clear_refs').write_text('5')  # the peak is the present size again
        self._before = self._peak()

    def _peak(self) -> int:
        return int(re.search(r'VmHWM:\s*(\d+) kB', (self._process / 'status').read_text())[1]) * 1024

    def growth(self) -> int:
        """Bytes by which the largest size since the beginning exceeds the size then."""
        return self._peak() - self._before


async def _ask(client: openai.AsyncOpenAI, model: str, messages: list) -> Answer | openai.APIStatusError:
    try:
        completion = await client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=TOKENS,
            temperature=0,
            extra_body={'return_token_ids': True, 'ignore_eos': True},
        )
    except openai.APIStatusError as error:
        return error
    return Answer(tuple(completion.choices[0].model_extra['output_ids']), completion.usage.prompt_tokens)


async def ask_together(server: ApiServer, messages: list, count: int, max_retries: int = 0) -> list:
    """The answers, or the errors, that so many clients get to the same messages at once."""
    client = openai.AsyncOpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=max_retries, timeout=HANG)
    model = (await client.models.list()).data[0].id
    return await asyncio.gather(*(_ask(client, model, messages) for _ in range(count)))
