"""The measurement: servers, warm-up, rounds in turns, results."""

import argparse
import asyncio
import contextlib
import signal
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmdeploy_vico.bench import BenchError, servers
from lmdeploy_vico.bench.checks import check_answer
from lmdeploy_vico.bench.client import Client, Outcome
from lmdeploy_vico.bench.prefills import DEBUG, count_prefills
from lmdeploy_vico.bench.report import table
from lmdeploy_vico.bench.report.breakdown import difference, parse_metrics
from lmdeploy_vico.bench.report.paper import paper_model, paper_speedup
from lmdeploy_vico.bench.report.results import CellResult, OutputFile
from lmdeploy_vico.bench.used import processor_seconds, what_was_added
from lmdeploy_vico.bench.workload.pictures import make_pictures
from lmdeploy_vico.bench.workload.requests import (
    AUTO,
    BASELINES,
    IMAGE,
    LABELS,
    LLM,
    OURS_ON_TURBOMIND,
    SERVER_OF_ENGINE,
    TURBOMIND,
    Cell,
    Picture,
    Requests,
    cells,
    visual_tokens,
)
from lmdeploy_vico.bench.workload.texts import make_texts
from lmdeploy_vico.launch import ApiServer, ServerError

# A round of a cell has so many requests for each that is on its way at a time: its end, when fewer and fewer are left,
# is short against it, and there are still rounds enough for the cells to take turns.
ROUND, LEAST_ROUND = 8, 100
UNCOUNTED = (TURBOMIND, OURS_ON_TURBOMIND)  # whose log tells of no steps


class Measurement:
    """One run of the benchmark.

    Args:
        options: the parsed command line (:mod:`lmdeploy_vico.bench.arguments`), with ``server_arguments`` and ``argv``.
    """

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.output = OutputFile(options.output_file)
        baselines = [name for name in BASELINES if name in options.baseline]
        self._ours = [SERVER_OF_ENGINE[engine] for engine in dict.fromkeys(options.language_engine)]
        todo = cells(options.mode, options.text_tokens, options.token_compression, baselines, self._ours)
        self.results = {cell: CellResult(cell, options.tiles) for cell in todo}
        self._baselines = [name for name in baselines if any(cell.server == name for cell in todo)]
        self._pictures: list[str] = []
        self._texts: dict[int, list[str]] = {}
        self._model = options.model or ''
        self._about: dict[str, Any] = {}
        self._unwritten = False
        self._servers: dict[str, ApiServer] = {}
        self._served: dict[str, str] = {}  # what each server calls its model
        self._groups: list[list[str]] = []  # servers that run at the same time, group after group

    def check(self) -> None:
        """Raises :class:`BenchError` for what would fail later; prints what is left out."""
        options = self.options
        self.output.check()
        if options.plot:
            table.check_plot(options.plot)
        if options.model:
            servers.check_model(options.model)
        elif set(options.baseline) & set(BASELINES) or len(self._ours) > 1:
            raise BenchError('Baselines and engines have servers of their own: use --model, not --base-url.')
        elif options.count_prefills:
            raise BenchError("--count-prefills reads a server's log: name a checkpoint with --model, not --base-url.")
        elif options.server_arguments:
            raise BenchError(
                'Arguments after -- are for a server that is started here: name a checkpoint with --model.'
            )
        if LLM in options.mode and AUTO in options.token_compression:
            self._say('llm mode: auto is left out, as no router sees synthetic images.')
        if LLM in options.mode and set(options.baseline) & set(BASELINES):
            self._say("llm mode: baselines are left out, as LMDeploy's own classes know no synthetic images.")

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Make pictures and servers, which takes a while and does not belong into an event loop; starts nothing."""
        options = self.options
        if options.base_url:
            asyncio.run(self._find_server())  # before pictures are made for it
        if IMAGE in options.mode:
            picture = Picture.of_tiles(options.tiles)
            count = (options.images or options.num_prompts) * picture.count
            if not self.console.is_terminal:
                self._say(f'Making {count} pictures ...')
            with self._progress('Making pictures', count) as done:
                self._pictures = make_pictures(count, picture.size, options.seed, done)
        if options.base_url:
            self._about = {'servers': {self._ours[0]: options.base_url}, 'environment': servers.environment(None)}
            return
        gpu, names = servers.gpu_name(), [*self._ours, *self._baselines]
        together = options.servers == 'together' or (options.servers == 'auto' and not gpu)
        servers.check_arguments(options.server_arguments, names, together, bool(gpu))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='vico-bench-')))
        given = options.server_arguments
        self._servers = {
            name: servers.make_server(name, options.model, options.mode, bool(gpu), given, scratch) for name in names
        }
        # One after the other and back again, so that what changes slowly changes them alike.
        self._groups = [names] if together else [[name] for name in (*names, *names[-2::-1])]
        if len(names) > 1:
            how = 'all run, one is measured at a time' if together else 'one after the other, then in reverse'
            self._say(f'{len(names)} servers: {how}.')
        self._about = {
            'servers': {},  # their commands, as they are started
            'servers_together': together,
            'environment_variables': {name: servers.recorded(one.environment) for name, one in self._servers.items()},
            'environment': servers.environment(gpu or 'cpu'),
        }

    async def _find_server(self) -> None:
        async with Client(self.options.base_url, self.options.request_timeout) as client:
            await client.model()

    async def run(self) -> bool:
        """Measure everything and print it; returns whether all requests of the plugin's own cells were answered."""
        if self._rounds == 1 and len(self.results) > 1:
            self._say('One round of each cell: too few requests for cells to take turns, so that drift stays in.')
        try:
            if self.options.base_url:
                async with Client(self.options.base_url, self.options.request_timeout) as client:
                    await self._measure({self._ours[0]: (client, None)}, range(self._rounds))
            else:
                await self._run_servers()
        except (BenchError, ServerError, asyncio.CancelledError):
            if any(result.completed for result in self.results.values()):
                table.show(self.console, self.results, paper_model(self._model), self.options.tiles)
                self._save(complete=False)  # nothing is written, over earlier results perhaps, where there is nothing
            raise
        table.show(self.console, self.results, paper_model(self._model), self.options.tiles)
        self._save(complete=True)
        self._say(f'Results: {self.output.path}')
        if self.options.plot:
            title = f'{Path(self._model).name}: {self.options.tiles} tiles, {self.options.max_concurrency} at a time'
            table.draw(self.options.plot, self.results, paper_model(self._model), self.options.tiles, title)
            self._say(f'Plot: {self.options.plot}')
        ours = [result for cell, result in self.results.items() if cell.is_ours]
        return all(result.completed and not result.failed and not result.error for result in ours)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    @property
    def _rounds(self) -> int:
        options = self.options
        length = options.round_prompts or max(ROUND * options.max_concurrency, LEAST_ROUND)
        return max(1, round(options.num_prompts / length))

    async def _run_servers(self) -> None:
        for index, group in enumerate(self._groups):
            before, times = self._groups[:index].count(group), self._groups.count(group)
            turns = range(-(-self._rounds * before // times), -(-self._rounds * (before + 1) // times))
            async with contextlib.AsyncExitStack() as stack:
                running = {}
                for name in group if turns else ():
                    if await self._started(stack, name):
                        server = self._servers[name]
                        client = Client(server.url, self.options.request_timeout)
                        running[name] = (await stack.enter_async_context(client), server)
                await self._measure(running, turns)
        if self.options.count_prefills:
            for name in dict.fromkeys(name for group in self._groups for name in group if name not in UNCOUNTED):
                await self._count(name)

    async def _count(self, name: str) -> None:
        """Count the prefill steps of a server's cells, on another one that writes a debug log."""
        server, options = self._servers[name], self.options
        todo = {
            cell: options.num_prompts for cell, one in self.results.items() if cell.server == name and not one.error
        }
        if not todo:
            return
        counting = server.again(*DEBUG, log=server.log.with_name(f'{name}-steps.log'))
        self._say(f'Counting prefill steps: $ {" ".join(counting.command)}')
        requests = Requests(self._served[name], options.tiles, self._pictures, self._texts, options.seed)
        try:
            steps = await count_prefills(counting, requests, todo, options.max_concurrency, options.request_timeout)
        except (BenchError, ServerError) as error:
            self._say(f'{LABELS[name]}: prefill steps were not counted: {error}')
            return
        for cell, number in steps.items():
            self.results[cell].prefill_steps_per_request = number

    async def _started(self, stack: contextlib.AsyncExitStack, name: str) -> bool:
        server = self._servers[name]
        server.start()
        stack.callback(server.stop)
        self._about['servers'][name] = command = ' '.join(server.command)
        self._say(f'$ {command}')
        try:
            await asyncio.to_thread(server.wait_until_ready)
        except ServerError:
            if name == self._ours[0]:
                raise
            self._lose(name, f'the server did not start: {servers.why_ended(server)}')
            return False
        return True

    async def _measure(self, running: Mapping[str, tuple[Client, ApiServer | None]], turns: range) -> None:
        """Warm up and measure the cells of some servers, which take turns."""
        requests = {}
        for name, (client, server) in running.items():
            try:
                requests[name] = await self._requests(name, client)
            except BenchError:
                if name == self._ours[0]:
                    raise
                self._lose(name, f'the server ended at once: {servers.why_ended(server)}')
        order = [cell for cell in self.results if cell.server in requests]
        for cell in order:
            await self._warm_up(cell, *running[cell.server], requests[cell.server])
        edges = [self.options.num_prompts * i // self._rounds for i in range(self._rounds + 1)]
        with self._progress('Measuring', (edges[turns.stop] - edges[turns.start]) * len(order)) as done:
            for turn in turns:
                indices = range(edges[turn], edges[turn + 1])
                shift = turn % len(order) if order else 0
                for cell in order[shift:] + order[:shift]:
                    if not self.results[cell].error:
                        client, server = running[cell.server]
                        await self._round(cell, client, server, requests[cell.server], indices, done)
                        self._save(complete=False)

    async def _requests(self, name: str, client: Client) -> Requests:
        options = self.options
        self._served[name] = model = await client.model()
        self._model = self._model or model
        for tokens in set(options.text_tokens) - set(self._texts):
            self._texts[tokens] = await make_texts(client.token_counts, tokens, options.num_prompts, options.seed)
        return Requests(model, options.tiles, self._pictures, self._texts, options.seed)

    async def _round(
        self,
        cell: Cell,
        client: Client,
        server: ApiServer | None,
        requests: Requests,
        indices: Sequence[int],
        done: Callable[[], object],
    ) -> None:
        # Cells start at different pictures, so that a cache of tiles finds as little as it can of the cell before.
        start = list(self.results).index(cell) * self.options.num_prompts // len(self.results)
        bodies = [requests.body(cell, index, start) for index in indices]
        before, used = parse_metrics(await client.metrics()), processor_seconds(server)
        measured = await client.round(bodies, self.options.max_concurrency, done)
        errors = [outcome.error for outcome in measured.outcomes if outcome.error]
        ended = bool(errors) and await client.ended(measured.outcomes)
        if not ended and not measured.gave_up:
            added = await what_was_added(client, before, measured)
            self.results[cell].add(measured, added, difference(processor_seconds(server), used))
            return
        # Its time says nothing: only whole rounds are compared.
        self.results[cell].add_failures(measured)
        why = servers.why_ended(server) if ended else f'it answers no request any more: {errors[-1]}'
        self._lose(cell.server, f'the server or its engine ended: {why}')
        if cell.server == self._ours[0]:
            raise BenchError(
                f'The server or its engine ended during the measurement ({why}). Results: {self.output.path}'
            )

    def _lose(self, name: str, reason: str) -> None:
        for cell, result in self.results.items():
            if cell.server == name and not result.error:
                result.error = reason
        self._say(f'{LABELS[name]}: {reason}')

    async def _warm_up(self, cell: Cell, client: Client, server: ApiServer | None, requests: Requests) -> None:
        """Ask for every number of compressed tiles once, check what comes back, then for many at a time."""
        result, options = self.results[cell], self.options
        if result.error:
            return
        shapes = {requests.compressed(cell, index): index for index in reversed(range(options.num_prompts))}
        bare = await client.ask(requests.body(cell, 0, text=''))
        outcomes = [await client.ask(requests.body(cell, index)) for index in shapes.values()]
        many = [requests.body(cell, i % options.num_prompts) for i in range(2 * options.max_concurrency)]
        try:
            for compressed, outcome in zip((requests.compressed(cell, 0), *shapes), (bare, *outcomes), strict=True):
                check_answer(cell, outcome, options.tiles, compressed)
            outcomes += (await client.round(many, options.max_concurrency)).outcomes
            for outcome in outcomes:
                check_answer(cell, outcome, options.tiles, None)
            self._check_alike(cell, bare)
        except BenchError as error:
            ended = await client.ended(outcomes)
            if cell.server == self._ours[0]:
                raise BenchError(
                    f'{error} The server has ended: {servers.why_ended(server)}' if ended else str(error)
                ) from error
            reason = (
                f'the server or its engine ended while warming up: {servers.why_ended(server)}' if ended else str(error)
            )
            self._lose(cell.server, reason)
        visual = bare.image_tokens if cell.is_ours else visual_tokens(options.tiles)
        result.overhead = bare.prompt_tokens - (visual or 0)

    def _check_alike(self, cell: Cell, bare: Outcome) -> None:
        """Raises :class:`BenchError` for a baseline whose prompts are not those of the plugin without compression."""
        if cell.is_ours:
            return
        ours = next(other for one, other in self.results.items() if one.is_ours and one.mode == cell.mode)
        expected = visual_tokens(self.options.tiles) + ours.overhead
        if bare.prompt_tokens != expected:
            raise BenchError(
                f'Its prompts have {bare.prompt_tokens} tokens instead of {expected}: it does not do the same work.'
            )

    def _save(self, complete: bool) -> None:
        """Write the results. In the middle of a run a failure is said, once; at its end it is raised."""
        model, tiles = paper_model(self._model), self.options.tiles
        arguments = {k: v for k, v in vars(self.options).items() if k not in ('run', 'argv')}
        content = {
            'benchmark': 'first_token',
            'complete': complete,
            'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
            'command': ' '.join(self.options.argv),
            'arguments': {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()},
            'model': self._model,
            'paper_model': model,
            **self._about,
            'cells': [
                result.as_json(table.speedup(self.results, cell), paper_speedup(model, tiles, cell))
                for cell, result in self.results.items()
            ],
        }
        try:
            self.output.write(content)
        except BenchError as error:
            if complete:
                raise
            if not self._unwritten:
                self._say(str(error))
            self._unwritten = True

    @contextlib.contextmanager
    def _progress(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Redrawn seldom: what draws takes time from the client.
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=1) as progress:
            task = progress.add_task(title, total=total)
            yield lambda: progress.advance(task)


async def _until_signalled(work: Coroutine[Any, Any, bool], received: list[int]) -> bool:
    """Await ``work``, but cancel it when the process is told to end: servers would be left running otherwise."""
    task = asyncio.ensure_future(work)

    def end(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    return await task


def run(options: argparse.Namespace) -> int:
    """Run the parsed command line; returns the exit status. Raises BenchError and ServerError."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)
    measurement = Measurement(options, console)
    measurement.check()
    received: list[int] = []
    with contextlib.ExitStack() as stack:
        measurement.prepare(stack)
        try:
            return 0 if asyncio.run(_until_signalled(measurement.run(), received)) else 1
        except asyncio.CancelledError:
            return 128 + received[0]  # as a shell reports a program that was ended by a signal
