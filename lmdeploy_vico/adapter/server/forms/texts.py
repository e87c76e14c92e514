"""Texts: refused where they cannot fit, and tokenized in threads, so that other requests go on meanwhile."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from lmdeploy.serve.openai.protocol import EncodeRequest

T = TypeVar('T')
ENCODE = '/v1/encode'


class TextBound:
    """What a text of so many characters has at least, by the longest token there is.

    Args:
        tokens: of the vocabulary, each in a spelling that has at least as many characters as it stands for.
    """

    def __init__(self, tokens: dict[str, int]) -> None:
        self._longest = max(map(len, tokens), default=1)

    def require_room(self, characters: int, session_len: int | None) -> None:
        """Raise ValueError if a text cannot fit the context, however it is tokenized."""
        least = characters // self._longest
        if session_len is not None and least >= session_len:
            raise ValueError(
                f'The text has {characters} characters and so at least {least} tokens, more than the model context '
                f'length ({session_len}) allows.'
            )


async def in_thread(executor: Executor, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function that never waits, in a thread."""
    return await asyncio.get_running_loop().run_in_executor(executor, lambda: _run(start()))


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError('it waits for something')


def encode_in_threads(router: APIRouter) -> None:
    """Have ``/v1/encode`` answered by a thread of the pool that FastAPI has for plain functions."""
    for index, route in enumerate(router.routes):
        if isinstance(route, APIRoute) and route.path == ENCODE and asyncio.iscoroutinefunction(route.endpoint):
            plain = _plain(route.endpoint)
            router.add_api_route(ENCODE, plain, methods=['POST'], dependencies=route.dependencies)
            router.routes[index] = router.routes.pop()
            return


def _plain(endpoint: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    def encode(request: EncodeRequest, raw_request: Request) -> Any:
        return _run(endpoint(request, raw_request))

    encode.__doc__ = endpoint.__doc__
    return encode
