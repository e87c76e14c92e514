"""Servers and their clients."""

import re
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from parity.conversations import on_the_wire
from parity.judge import TOKENS, Answer
from waiting import HANG

from lmdeploy_vico.launch import ApiServer


class Client:
    """A server as the official OpenAI client sees it."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.openai = openai.OpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=0, timeout=HANG)
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


@pytest.fixture(scope='module')
def serve(tmp_path_factory) -> Callable[..., ApiServer]:
    """``serve(checkpoint, *arguments)``: a running server; all are stopped at the end of the module."""
    servers = []

    def start(checkpoint: Path, *arguments: str, **environment: str) -> ApiServer:
        log = tmp_path_factory.mktemp('server') / 'log'
        server = ApiServer(checkpoint, *arguments, log=log, environment=environment, timeout=HANG)
        servers.append(server)
        return server.__enter__()

    yield start
    for server in servers:
        server.stop()
