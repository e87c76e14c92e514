"""Questions to a server of the reader, each at the compressions that are wanted of it."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from lmdeploy_vico.choices import typed
from lmdeploy_vico.evaluation.answers import Answer, AnswerFile
from lmdeploy_vico.evaluation.client import Server, Task, ask_all
from lmdeploy_vico.evaluation.data import DataSet
from lmdeploy_vico.evaluation.prompts import Asking
from lmdeploy_vico.evaluation.rules import RULES
from lmdeploy_vico.evaluation.scores import NONE, TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.launch import ApiServer

CONCURRENCY = 8
TIMEOUT = 600.0  # seconds for an answer
MAX_TOKENS = 8
EXACT = RULES['exact']
# What a question is asked at: by a name, a compression for each index.
Ways = Mapping[str, Mapping[str, str]]


class Client:
    """Asks one server, and keeps its answers.

    Args:
        server: that runs.
        console: for progress.
        scratch: a folder for files of answers.
    """

    def __init__(self, server: ApiServer, console: Console, scratch: Path) -> None:
        self._server, self._console, self._scratch = server, console, scratch

    def ask(self, data: DataSet, ways: Ways) -> dict[str, dict[str, Answer]]:
        """Answers by way and index; raises RuntimeError if a question was not answered."""
        todo: list[Task] = [
            (data, EXACT, question, chosen[question.index]) for question in data.questions for chosen in ways.values()
        ]
        answers = asyncio.run(self._ask_all(todo))
        failed = [answer for answer in answers.values() if answer.error]
        if failed:
            raise RuntimeError(f'{len(failed)} requests failed, the first with: {failed[0].error}')
        return {
            way: {
                question.index: answers[data.name, question.index, chosen[question.index]]
                for question in data.questions
            }
            for way, chosen in ways.items()
        }

    async def _ask_all(self, todo: Sequence[Task]) -> dict[tuple[str, str, str], Answer]:
        async with Server(self._server.url, TIMEOUT) as server:
            asking = Asking(await server.model(), MAX_TOKENS, instruction='')
            file = AnswerFile(self._scratch / f'answers-{len(list(self._scratch.iterdir()))}.jsonl', {})
            with file, Progress(console=self._console) as progress:
                task = progress.add_task('asking', total=len(todo))
                await ask_all(server, todo, asking, typed, CONCURRENCY, file, lambda _: progress.advance(task))
        return file.answers


def everywhere(data: DataSet, *compressions: str) -> dict[str, dict[str, str]]:
    """Each compression for all questions, under its own name."""
    return {one: {question.index: one for question in data.questions} for one in compressions}


def tiles(full: Answer) -> int:
    """The tiles of a prompt, by its answer without compression."""
    assert full.compression == NONE and full.image_tokens is not None
    return full.image_tokens // TOKENS_FULL


def compressed(answer: Answer, full: Answer) -> int:
    """The tiles with 64 visual tokens, by the same prompt's answer without compression."""
    assert answer.image_tokens is not None
    return (tiles(full) * TOKENS_FULL - answer.image_tokens) // (TOKENS_FULL - TOKENS_COMPRESSED)
