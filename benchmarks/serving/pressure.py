"""What the overload valve (option ``pressure_compression``) gains where the language model is the bottleneck.

Two servers of one tiny checkpoint, one of them with the valve, serve the same closed loop in turns. Visual tokens are
made up (``synthetic_images``), so that the vision side costs nothing and prefills are all there is to do. Each request
asks for as many tiles and leaves to the server how many of them are compressed: what the valve compresses is what it is
measured for. Before anything is timed, a single client is answered with the same visual tokens by both. Before each
turn all pressure of the one before has faded.

    python -m benchmarks pressure --output results.json
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.lib.facts import facts
from lmdeploy_vico.adapter.server.pressure.valve import IDLE, RELEASE
from lmdeploy_vico.bench.client import Client, Outcome
from lmdeploy_vico.bench.workload.requests import LLM, OURS, Cell, Requests, visual_tokens
from lmdeploy_vico.checkpoints.random import make_tiny_checkpoint
from lmdeploy_vico.launch import ApiServer

OFF, ON = 'off', 'on'
TEXT = 'What is in this picture?'
PAUSE = RELEASE + IDLE  # seconds before a turn


class PressureError(RuntimeError):
    """The measurement cannot be used; the message says why."""


@dataclass
class Turns:
    """What the turns of one server gave.

    Attributes:
        seconds: of all turns together.
        outcomes: of all requests that were sent in them.
    """

    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Requests answered a minute, TTFT in seconds, and the mean of visual tokens."""
        good = [outcome for outcome in self.outcomes if outcome.error is None]
        if len(good) < 2:
            raise PressureError('Hardly anything was answered: make the turns longer (--seconds).')
        cuts = statistics.quantiles([outcome.ttft for outcome in good], n=100, method='inclusive')
        return {
            'answered': len(good),
            'failed': len(self.outcomes) - len(good),
            'answered_per_minute': 60 * len(good) / self.seconds,
            'ttft_p50': cuts[49],
            'ttft_p99': cuts[98],
            'image_tokens': statistics.fmean(outcome.image_tokens or 0 for outcome in good),
        }


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(description='Measure the overload valve where prefills are the bottleneck.')
    parser.add_argument('--share', type=float, default=0.5, help='pressure_compression (default: %(default)s)')
    parser.add_argument('--waiting', type=int, default=4, help='pressure_waiting (default: %(default)s)')
    parser.add_argument('--clients', type=int, default=12, help='requests at a time (default: %(default)s)')
    parser.add_argument('--tiles', type=int, default=10, help='of a request (default: %(default)s)')
    parser.add_argument('--turns', type=int, default=4, help='of each server (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=30, help='of a turn (default: %(default)s)')
    parser.add_argument('--output', type=Path, help='file for the results, JSON')
    arguments = parser.parse_args(argv)
    load = os.getloadavg()[0]  # before, to tell what other programs did from what this one did
    with tempfile.TemporaryDirectory(prefix='vico-pressure-') as scratch:
        measured = asyncio.run(_measure(arguments, Path(scratch)))
    conditions = {name: value for name, value in vars(arguments).items() if name != 'output'}
    conditions |= {'pause': PAUSE, 'load_average': [load, os.getloadavg()[0]]}
    results = {'facts': facts(), 'conditions': conditions, **measured}
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + '\n')
    Console().print(_table(measured))
    return 0


async def _measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, dict[str, float]]:
    path = make_tiny_checkpoint(scratch / 'checkpoint', size='small')
    with contextlib.ExitStack() as stack:
        servers = {name: _server(path, name, arguments, scratch) for name in (OFF, ON)}
        for server in servers.values():
            stack.callback(server.stop)
            server.start()
        for server in servers.values():
            server.wait_until_ready()
        return await _take_turns({name: server.url for name, server in servers.items()}, arguments)


def _server(path: Path, name: str, arguments: argparse.Namespace, scratch: Path) -> ApiServer:
    environment = {
        'LMDEPLOY_VICO_SYNTHETIC_IMAGES': '1',
        'LMDEPLOY_VICO_PRESSURE_COMPRESSION': str(arguments.share if name == ON else 0),
        'LMDEPLOY_VICO_PRESSURE_WAITING': str(arguments.waiting),
    }
    return ApiServer(path, log=scratch / f'{name}.log', environment=environment, timeout=600)


async def _take_turns(urls: dict[str, str], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    turns = {name: Turns() for name in urls}
    async with contextlib.AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(Client(url)) for name, url in urls.items()}
        requests = {name: Requests(await client.model(), arguments.tiles, [], {}) for name, client in clients.items()}
        for name, client in clients.items():
            await _check(client, _body(requests[name], 0), arguments.tiles)
        for turn in range(arguments.turns):
            for name in (OFF, ON) if turn % 2 == 0 else (ON, OFF):
                await asyncio.sleep(PAUSE)
                bodies = _bodies(requests[name], 1 + turn * 10**5, arguments.seconds)
                done = await clients[name].round(bodies, arguments.clients)
                turns[name].seconds += done.duration
                turns[name].outcomes += done.outcomes
    return {name: one.summary() for name, one in turns.items()}


async def _check(client: Client, body: bytes, tiles: int) -> None:
    """Raise PressureError unless a single client, who is no pressure, gets all the visual tokens that it asks for."""
    outcome = await client.ask(body)
    if outcome.error or outcome.image_tokens != visual_tokens(tiles):
        raise PressureError(f'A single request got {outcome.image_tokens} visual tokens: {outcome.error or "wrong"}.')


def _bodies(requests: Requests, first: int, seconds: float) -> Iterator[bytes]:
    """Requests that differ from each other, for as long as a turn takes."""
    end = time.monotonic() + seconds
    index = first
    while time.monotonic() < end:
        yield _body(requests, index)
        index += 1


def _body(requests: Requests, index: int) -> bytes:
    # Of no stated compression: the valve leaves alone what a client states.
    return requests.body(Cell(LLM, OURS, 0, None), index, text=TEXT)


def _table(measured: dict[str, dict[str, float]]) -> Table:
    table = Table('valve', 'answered a minute', 'TTFT p50 s', 'TTFT p99 s', 'visual tokens a request', 'failed')
    for name, one in measured.items():
        table.add_row(
            name,
            f'{one["answered_per_minute"]:.1f}',
            f'{one["ttft_p50"]:.2f}',
            f'{one["ttft_p99"]:.2f}',
            f'{one["image_tokens"]:.0f}',
            f'{one["failed"]:.0f}',
        )
    table.add_row(
        'on / off',
        *(f'{measured[ON][key] / measured[OFF][key]:.2f}' for key in ('answered_per_minute', 'ttft_p50', 'ttft_p99')),
        f'{measured[ON]["image_tokens"] / measured[OFF]["image_tokens"]:.2f}',
        '',
    )
    return table
