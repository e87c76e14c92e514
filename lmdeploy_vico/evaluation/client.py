"""Asks a server all questions at all compressions, so many at a time."""

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import aiohttp

from lmdeploy_vico.bench.client import error_sentence
from lmdeploy_vico.evaluation import EvaluationError
from lmdeploy_vico.evaluation.answers import Answer, AnswerFile
from lmdeploy_vico.evaluation.data import DataSet, Question
from lmdeploy_vico.evaluation.prompts import Asking, body, digest
from lmdeploy_vico.evaluation.rules.rule import Rule

LOOK_TIMEOUT = 30  # seconds for the name of the model
TRIES = 20  # of a request while the server is busy
BUSY = 503
WAIT = 1.0  # seconds before the next try, where the server does not say how many


class Server:
    """A server with OpenAI's protocol. An asynchronous context manager.

    Args:
        url: of the server, with or without ``/v1``.
        timeout: seconds for one answer.
        api_key: sent with every request; None for none.
    """

    def __init__(self, url: str, timeout: float, api_key: str | None = None) -> None:
        self.url = url.rstrip('/').removesuffix('/v1')
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._headers = {'Authorization': f'Bearer {api_key}'} if api_key else {}

    async def __aenter__(self) -> 'Server':
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, headers=self._headers)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def model(self) -> str:
        """The name of the model; raises :class:`EvaluationError` where no OpenAI server answers."""
        timeout = aiohttp.ClientTimeout(total=LOOK_TIMEOUT)
        try:
            async with self._session.get(f'{self.url}/v1/models', timeout=timeout) as response:
                response.raise_for_status()
                name: str = (await response.json())['data'][0]['id']
        except (
            aiohttp.ClientError,
            asyncio.TimeoutError,
            OSError,
            ValueError,
            KeyError,
            IndexError,
            TypeError,
        ) as error:
            raise EvaluationError(
                f'No OpenAI server answers at {self.url} ({_name(error)}): check --base-url, which begins with http://.'
            ) from error
        return name

    async def ask(self, data: str, question: Question, compression: str, sent: dict[str, Any]) -> Answer:
        """Send one request. Whatever the server does, it becomes an answer or a failure with a sentence."""
        try:
            for _ in range(TRIES):
                async with self._session.post(f'{self.url}/v1/chat/completions', json=sent) as response:
                    if response.status == BUSY:
                        failure = error_sentence(await response.text(), BUSY)
                        await asyncio.sleep(float(response.headers.get('Retry-After', WAIT)))
                        continue
                    if response.status != 200:
                        failure = error_sentence(await response.text(), response.status)
                        break
                    return _answer(data, question, compression, await response.json(content_type=None))
        except asyncio.TimeoutError:  # Python 3.10 has another of that name
            failure = 'The server did not answer in time.'
        except (aiohttp.ClientError, OSError) as error:
            failure = f'The connection was lost ({_name(error)}).'
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            failure = f'The answer is not what an OpenAI server sends ({_name(error)}).'
        return Answer(data, question.index, compression, error=failure)


Task = tuple[DataSet, Rule, Question, str]


def tasks(data: Sequence[tuple[DataSet, Rule]], compressions: Sequence[str]) -> Iterator[Task]:
    """Everything to ask. A question is asked at all compressions in a row, so that none has the server to itself."""
    for (dataset, rule), question, compression in itertools.chain.from_iterable(
        itertools.product([one], one[0].questions, compressions) for one in data
    ):
        yield dataset, rule, question, compression


def is_answered(task: Task, answers: AnswerFile, asking: Asking) -> bool:
    """Whether there is an answer to it, and to what the data set asks now."""
    data, rule, question, compression = task
    answer = answers.answers.get((data.name, question.index, compression))
    return answer is not None and answer.asked == digest(question, rule, asking)


async def ask_all(
    server: Server,
    todo: Sequence[Task],
    asking: Asking,
    parse: Callable[[str], Any],
    concurrency: int,
    answers: AnswerFile,
    done: Callable[[Answer], object],
) -> None:
    """Ask and keep the answers as they come.

    Args:
        parse: from a compression as the command line has it to its value in a request.
        done: called with every answer.

    Raises:
        EvaluationError: so many requests in a row failed that the server must be gone.
    """
    waiting = iter(todo)
    failed_in_a_row = 0

    async def work() -> None:
        nonlocal failed_in_a_row
        for dataset, rule, question, compression in waiting:
            try:
                sent = await asyncio.to_thread(body, question, rule, parse(compression), asking)
            except OSError as error:
                failure = f'The video cannot be read ({_name(error)}).'
                answer = Answer(dataset.name, question.index, compression, error=failure)
            else:
                answer = await server.ask(dataset.name, question, compression, sent)
            answer = dataclasses.replace(answer, asked=digest(question, rule, asking))
            answers.keep(answer)
            failed_in_a_row = failed_in_a_row + 1 if answer.error else 0
            done(answer)
            if failed_in_a_row >= max(2 * concurrency, 10):
                raise EvaluationError(
                    f'{failed_in_a_row} requests in a row failed, the last with: {answer.error} The answers so far are '
                    'kept: the same command goes on from there.'
                )

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def _answer(data: str, question: Question, compression: str, said: dict[str, Any]) -> Answer:
    usage = said['usage']
    return Answer(
        data=data,
        index=question.index,
        compression=compression,
        text=said['choices'][0]['message']['content'] or '',
        prompt_tokens=usage['prompt_tokens'],
        image_tokens=(usage.get('prompt_tokens_details') or {}).get('image_tokens'),
    )


def _name(error: BaseException) -> str:
    return str(error) or type(error).__name__
