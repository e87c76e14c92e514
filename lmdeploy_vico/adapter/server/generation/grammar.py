"""``response_format``: a grammar is tried in a thread, within bounds of size and time, before the engine gets it.

The PyTorch engine compiles grammars in its loop, where they hold up everybody, and ends if one does not compile.
TurboMind is given what the trial has compiled.
"""

import asyncio
import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from lmdeploy_vico.adapter.server.generation.errors import ParameterError
from lmdeploy_vico.adapter.server.overload import OverloadError

LARGEST = 2**16  # bytes of JSON
DEEPEST = 64  # levels of JSON; compiling takes time with the square of them
SECONDS = 2.0  # for a grammar to compile
AT_ONCE = 2  # threads that compile
REMEMBERED = 128  # response formats that are known to compile; LMDeploy remembers as many


class GrammarCheck:
    """Tries the response formats of all requests.

    A thread cannot be stopped: one that has been given up goes on to its end, and counts among those at work.

    Args:
        compile: compiles a response format; raises ValueError, KeyError or RuntimeError if it cannot be compiled. What
            it returns is kept.
        seconds: that it may take.
        remembered: how many formats are kept, with what they compile to.
    """

    def __init__(
        self, compile: Callable[[dict[str, Any]], Any], seconds: float = SECONDS, remembered: int | None = None
    ) -> None:
        self._compile = compile
        self._seconds = seconds
        self._remembered = REMEMBERED if remembered is None else remembered
        self._good: OrderedDict[str, Any] = OrderedDict()
        self._trials: dict[str, asyncio.Task[Any]] = {}  # that are under way: the choices of a request share one
        self._threads = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, response_format: Any) -> Any:
        """Return what a response format compiles to, once that is known.

        Raises:
            ParameterError: it is too large, does not compile, or takes too long to.
            OverloadError: others are being compiled, and take long.
        """
        text = _as_json(response_format)
        if text in self._good:
            self._good.move_to_end(text)
            return self._good[text]
        trial = self._trials.get(text)
        if trial is None:
            trial = self._trials[text] = asyncio.ensure_future(self._try(response_format))
            trial.add_done_callback(partial(self._tried, text))
        return await asyncio.shield(trial)  # one client's leaving is no matter of the others

    def _tried(self, text: str, trial: 'asyncio.Task[Any]') -> None:
        del self._trials[text]
        if trial.cancelled() or trial.exception() is not None:
            return
        self._good[text] = trial.result()
        while len(self._good) > self._remembered:
            self._good.popitem(last=False)

    async def _try(self, response_format: dict[str, Any]) -> Any:
        try:
            await asyncio.wait_for(self._threads.acquire(), self._seconds)
        except asyncio.TimeoutError:
            raise OverloadError('Other response formats are being compiled. Try again later.') from None
        work = self._in_thread(response_format)
        try:
            return await asyncio.wait_for(asyncio.shield(work), self._seconds)
        except asyncio.TimeoutError:
            raise ParameterError(
                f'The response_format took longer than {self._seconds:g} seconds to compile. Simplify it.'
            ) from None
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ParameterError(f'The response_format cannot be compiled: {_reason(error)}') from error

    def _in_thread(self, response_format: dict[str, Any]) -> 'asyncio.Future[Any]':
        """Compile in a thread that does not keep the process from ending."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        done.add_done_callback(lambda future: future.cancelled() or future.exception())  # which may have been given up

        def finish(compiled: Any, error: Exception | None) -> None:
            self._threads.release()
            if done.cancelled():
                return
            if error is None:
                done.set_result(compiled)
            else:
                done.set_exception(error)

        def work() -> None:
            compiled, error = None, None
            try:
                compiled = self._compile(response_format)
            except Exception as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(finish, compiled, error)

        threading.Thread(target=work, name='vico-grammar', daemon=True).start()
        return done


def _as_json(response_format: Any) -> str:
    if not isinstance(response_format, dict):
        raise ParameterError('response_format must be an object.')
    if _depth(response_format) > DEEPEST:
        raise ParameterError(f'response_format must not be nested more than {DEEPEST} levels deep.')
    try:
        text = json.dumps(response_format, ensure_ascii=False, separators=(',', ':'))
        size = len(text.encode())
    except (TypeError, ValueError):
        raise ParameterError('response_format must be JSON.') from None
    if size > LARGEST:
        raise ParameterError(f'response_format must have at most {LARGEST} bytes, not {size}.')
    return text


def _depth(value: Any) -> int:
    """Levels of a JSON value, without recursion; counted up to one more than are accepted."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        depth += 1
        level = [
            item
            for parent in level
            if isinstance(parent, dict | list)
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
    return depth


def _reason(error: Exception) -> str:
    """An error's text without what xgrammar says about its own source file."""
    return re.sub(r'^.*\.cc:\d+: ', '', str(error).strip())[:200]


def compiler_of(tokenizer: Any, vocabulary: int) -> Callable[[dict[str, Any]], None]:
    """Return what compiles a response format as LMDeploy's PyTorch engine does, for a tokenizer of transformers'.

    Args:
        tokenizer: of the served model.
        vocabulary: tokens of its language model.
    """
    compile = compiling_with(partial(_compiler, tokenizer, vocabulary))

    def try_to_compile(response_format: dict[str, Any]) -> None:
        compile(response_format)  # the engine does so again, in its process

    return try_to_compile


def compiling_with(make_compiler: Callable[[], Any]) -> Callable[[dict[str, Any]], Any]:
    """Return what compiles response formats as LMDeploy does, in any thread; None comes of one that asks for nothing.

    Args:
        make_compiler: called once, when there is something to compile.
    """
    lock = threading.Lock()
    compilers: list[Any] = []

    def compile(response_format: dict[str, Any]) -> Any:
        from lmdeploy._guided_decoding import compile_response_format, ensure_response_format_compilable

        ensure_response_format_compilable(response_format)  # LMDeploy asks this again, in the loop, and remembers it
        if response_format.get('type', 'text') == 'text':
            return None
        with lock:
            if not compilers:
                compilers.append(make_compiler())
        return compile_response_format(compilers[0], response_format)

    return compile


def _compiler(tokenizer: Any, vocabulary: int) -> Any:
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=max(vocabulary, len(tokenizer)))
    return xgrammar.GrammarCompiler(info, cache_enabled=False)
