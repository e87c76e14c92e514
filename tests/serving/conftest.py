"""Servers, clients and the judge of their answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from parity.reference import Reference, chat_segments
from serving.conversations import conversations, on_the_wire

from lmdeploy_vico.testing.server import ApiServer

# An answer's token may differ from the reference's best one by a near tie in bfloat16, no more: in standard deviations
# of the step's logits.
GAP = 0.05
TOKENS = 12


@dataclass(frozen=True)
class Answer:
    """What a server or a pipeline said to one prompt."""

    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int = 0


class Judge:
    """Compares answers with the cache-free reference; the same answer to the same prompt is judged once."""

    def __init__(self, checkpoint: Path) -> None:
        self.reference = Reference(checkpoint)
        self._verdicts: dict[Any, tuple[float, int]] = {}

    def check(self, messages: Sequence[dict], answer: Answer, compression: Any = 'auto', name: str = '') -> None:
        """Assert that ``answer`` is right: its tokens and the length of its prompt."""
        assert len(answer.token_ids) >= TOKENS, name
        key = (name or repr(messages), compression, answer.token_ids)
        if key not in self._verdicts:
            judgement = self.reference.judge(chat_segments(messages), answer.token_ids, compression)
            self._verdicts[key] = (judgement.gap, judgement.prompt_tokens)
        gap, prompt_tokens = self._verdicts[key]
        assert answer.prompt_tokens == prompt_tokens, name
        assert gap <= GAP, f'{name}: {gap:.3f} standard deviations from the best token'


class Client:
    """A server as the official OpenAI client sees it."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.openai = openai.OpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=0, timeout=120)
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


@pytest.fixture(scope='module')
def serve(tmp_path_factory) -> Callable[..., ApiServer]:
    """``serve(checkpoint, *arguments)``: a running server; all are stopped at the end of the module."""
    servers = []

    def start(checkpoint: Path, *arguments: str, **environment: str) -> ApiServer:
        log = tmp_path_factory.mktemp('server') / 'log'
        server = ApiServer(checkpoint, *arguments, log=log, environment=environment)
        servers.append(server)
        return server.__enter__()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope='session')
def judge(make_checkpoint) -> Callable[..., Judge]:
    """``judge(llm=..., vit=...)``: the judge of a tiny checkpoint's answers."""
    judges: dict[Path, Judge] = {}

    def get(**kind: Any) -> Judge:
        path = make_checkpoint(**kind)
        if path not in judges:
            judges[path] = Judge(path)
        return judges[path]

    return get


@pytest.fixture(scope='session')
def prompts(pictures) -> dict[str, list[dict]]:
    """The conversations by name, with PIL images."""
    return conversations(pictures)
