"""What many clients at once get, judged by the cache-free reference."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from parity.judge import Answer
from serving.client import Client

CLIENTS = 16
ROUNDS = 3  # times each prompt is sent


def check_answers(
    clients: Sequence[Client], prompts: dict[str, list[dict]], check: Callable[..., Any], rounds: int = ROUNDS
) -> list[Answer]:
    """Send every prompt ``rounds`` times, by 16 clients at once and to each server in turn, and check all answers."""
    asked = list(prompts) * rounds
    servers = itertools.cycle(clients)
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda name, client: client.chat(prompts[name]), asked, servers))
    for name, answer in zip(asked, answers, strict=True):
        check(prompts[name], answer, name=name)
    return answers
