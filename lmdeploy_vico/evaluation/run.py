"""The evaluation: data sets and servers, questions asked, results written."""

import argparse
import asyncio
import contextlib
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmdeploy_vico import __version__
from lmdeploy_vico.bench.report.results import OutputFile
from lmdeploy_vico.bench.report.table import check_plot
from lmdeploy_vico.bench.servers import check_model
from lmdeploy_vico.choices import typed
from lmdeploy_vico.evaluation import EvaluationError, report
from lmdeploy_vico.evaluation.answers import Answer, AnswerFile
from lmdeploy_vico.evaluation.client import Server, ask_all, is_answered, tasks
from lmdeploy_vico.evaluation.data import DataSet, read
from lmdeploy_vico.evaluation.prompts import Asking
from lmdeploy_vico.evaluation.rules import choose, named
from lmdeploy_vico.evaluation.rules.rule import Rule
from lmdeploy_vico.evaluation.scores import NONE, Result, results
from lmdeploy_vico.launch import ApiServer

FAILURES_SHOWN = 5
PROGRESS_LINES = 10  # where no progress bar can be drawn


class Evaluation:
    """One run of ``lmdeploy-vico eval``.

    Args:
        options: the parsed command line (:mod:`lmdeploy_vico.evaluation.arguments`), with ``server_arguments``.
    """

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.compressions = list(dict.fromkeys([NONE, *options.compression]))
        self.output = OutputFile(options.output_file)
        self.data: list[tuple[DataSet, Rule]] = []
        self.measured: report.Measured = []

    def prepare(self) -> None:
        """Read everything; raises :class:`EvaluationError` or BenchError for what would fail later."""
        options = self.options
        self.output.check()
        if options.plot:
            check_plot(options.plot)
        if options.bench_results:
            if not options.plot:
                raise EvaluationError('--bench-results is for --plot: name its file.')
            self.measured = report.throughputs(options.bench_results)
        if options.model:
            check_model(options.model)
        elif options.server_arguments:
            raise EvaluationError('Arguments after -- are for a server that is started here: name it with --model.')
        for path in options.data:
            data = read(path)
            if any(data.name == other.name for other, _ in self.data):
                raise EvaluationError(f'Two data sets are called {data.name}: rename a file.')
            data = dataclasses.replace(data, questions=data.questions[: options.limit])
            rule = named(options.rule) if options.rule else choose(data.name, data.questions)
            self.data.append((data, rule))
            self._say(f'{data.name}: {len(data.questions)} questions, rule {rule.name}')

    def run(self) -> bool:
        """Ask, judge, print and write; returns whether every question was answered."""
        with contextlib.ExitStack() as stack:
            url = self.options.base_url or self._start(stack)
            answers = asyncio.run(self._ask(url))
        lines = [
            result for data, rule in self.data for result in results(data, rule, self.compressions, answers.answers)
        ]
        self.console.print(report.table(lines, {data.name: rule.unit for data, rule in self.data}))
        failed = [answer for answer in answers.answers.values() if answer.error]
        self._say_failures(failed)
        self._write(lines, failed)
        if self.options.plot:
            left_out = report.draw(self.options.plot, lines, self.measured)
            named = ''.join(f', {result.data} at {result.compression}' for result in left_out)
            self._say(f'Plot: {self.options.plot}{f" without what is not known{named}" if named else ""}')
        return not failed

    def _start(self, stack: contextlib.ExitStack) -> str:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='vico-eval-')))
        server = ApiServer(self.options.model, *self.options.server_arguments, log=scratch / 'server.log', timeout=1800)
        self._say(f'$ {" ".join(server.command)}')
        stack.enter_context(server)
        return server.url

    async def _ask(self, url: str) -> AnswerFile:
        options = self.options
        async with Server(url, options.request_timeout, options.api_key) as server:
            asking = Asking(
                await server.model(),
                options.max_tokens,
                options.max_tiles,
                options.frames,
                options.subtitles,
                options.instruction,
            )
            path = options.output_file.with_name(f'{options.output_file.name}.answers.jsonl')
            answers = AnswerFile(path, dataclasses.asdict(asking))
            everything = list(tasks(self.data, self.compressions))
            todo = [task for task in everything if not is_answered(task, answers, asking)]
            if answers.answers:
                there = len(everything) - len(todo)
                self._say(f'{there} answers are in {path} already, {len(todo)} are asked for.')
            with answers, self._progress(len(todo)) as done:
                await ask_all(server, todo, asking, typed, options.max_concurrency, answers, done)
        return answers

    @contextlib.contextmanager
    def _progress(self, total: int) -> Iterator[Any]:
        columns = TextColumn('Asking'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task('', total=total)
            count = 0

            def done(answer: Answer) -> None:
                nonlocal count
                del answer
                count += 1
                progress.advance(task)
                if not self.console.is_terminal and count % -(-total // PROGRESS_LINES) == 0:
                    self._say(f'{count} of {total} questions asked')

            yield done

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _say_failures(self, failed: Sequence[Answer]) -> None:
        if not failed:
            return
        self._say(f'{len(failed)} requests failed; their questions do not count at any compression:')
        for error, count in Counter(answer.error for answer in failed).most_common(FAILURES_SHOWN):
            first = next(answer for answer in failed if answer.error == error)
            self._say(f'  {count} x {error} (first: {first.data} {first.index} at {first.compression})')

    def _write(self, lines: Sequence[Result], failed: Sequence[Answer]) -> None:
        options = self.options
        self.output.write(
            {
                'evaluation': 'compression',
                'version': __version__,
                'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
                'model': options.model or options.base_url,
                'max_tiles': options.max_tiles,
                'max_tokens': options.max_tokens,
                'rules': {data.name: rule.name for data, rule in self.data},
                'failed': [dataclasses.asdict(answer) for answer in failed],
                'results': [dataclasses.asdict(result) for result in lines],
            }
        )
        self._say(f'Results: {self.output.path}')
