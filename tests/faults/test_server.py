"""Hostile requests, clients that leave, engines that are stopped and killed: good clients go on, nothing stays behind.

VICO_FAULTS says how many hostile requests of each kind (100 unless given). The tests run in their order, on one server
but for the last, with good clients beside each; ``-s`` shows a line of figures for each.
"""

import asyncio
import os
import sys
import time
from pathlib import Path
from statistics import median

import psutil
import pytest
from waiting import HANG

from faults.bodies import hostile_bodies
from faults.clients import GoodClients, HostileClients, chat, leave, session, with_picture
from faults.mutations import mutated, originals
from faults.schema import schema_bodies
from faults.watch import HighestMemory, at_rest, engine
from lmdeploy_vico.launch import ApiServer

pytestmark = [pytest.mark.server, pytest.mark.faults]
COUNT = int(os.environ.get('VICO_FAULTS', '100'))
GOOD, HOSTILE = 32, 8  # clients
LEAVING = 80
STOPS, STOPPED = 10, 1.0  # times, seconds
KILLS = 10
BETWEEN = 100  # hostile requests between two known good ones that are alone
WARM_UP = 40  # hostile requests of each kind, before the resources at rest are noted: pools are filled by then
AT_REST = 256  # requests of good clients without a fault
SLOWER = 3.0  # times the slowest answer without a fault
MEMORY = 2**28  # bytes for what clients send
# MiB beyond that: allocators, thread stacks, and what the engine takes for a batch of tokens and grammars.
API_SLACK, ENGINE_SLACK = 128, 256
# MiB that allocators may keep, and threads of pools that were not full. What requests leak is many times more.
LEFT = {'memory': 64, 'threads': 8}
SESSION_LEN = '512'  # tokens: a request for as many as there is room for ends soon


def say(text: str) -> None:
    sys.stdout.write(f'\n{text}\n')


def make_server(checkpoint: Path, log: Path) -> ApiServer:
    environment = {'LMDEPLOY_VICO_MAX_DECODED_BYTES': str(MEMORY)}
    return ApiServer(checkpoint, '--model-name', 'vico', '--session-len', SESSION_LEN, log=log, environment=environment)


@pytest.fixture(scope='module')
def files(pictures):
    return originals(pictures['coffee'].resize((96, 64)))


@pytest.fixture(scope='module')
def good(files):
    return [chat('Name a colour.'), with_picture(files['PNG'])]


@pytest.fixture(scope='module')
def server(make_checkpoint, tmp_path_factory):
    with make_server(make_checkpoint(), Path(tmp_path_factory.mktemp('faults')) / 'server.log') as started:
        yield started


def hostile(kind: str, server: ApiServer, files: dict[str, bytes], count: int, seed: int = 12) -> list:
    if kind == 'bodies':
        return list(hostile_bodies('vico', count, seed))
    if kind == 'schema':
        return schema_bodies(server.url, 'vico', count)
    return [(name, with_picture(data)) for name, data in mutated(files, count, seed)]


class Baseline:
    """A server without a fault: the right answers, the slowest of each, what it takes, and what it took at most."""

    def __init__(self, server: ApiServer, good: list[bytes], files: dict[str, bytes]) -> None:
        clients = GoodClients(lambda: server.url, good, GOOD)

        async def run() -> None:
            async with session() as asked:
                for kind in ('pictures', 'bodies', 'schema'):
                    await HostileClients(server.url, HOSTILE).send(asked, hostile(kind, server, files, WARM_UP, seed=1))
                async with clients.busy(asked):
                    while sum(map(len, clients.seconds)) < AT_REST:
                        await asyncio.sleep(0.05)

        asyncio.run(run())
        assert not clients.faults, clients.faults
        self.answers = clients.answers
        self.slowest = [max(times) for times in clients.seconds]
        self.rest = at_rest(server, lambda now: not any(now.gauges))
        say(f'without a fault: slowest {self.slowest[0]:.2f} s text, {self.slowest[1]:.2f} s picture; {self.rest}')


@pytest.fixture(scope='module')
def baseline(server, good, files):
    return Baseline(server, good, files)


@pytest.fixture(scope='module')
def memory(server, baseline):
    with HighestMemory(server) as watched:
        yield watched


@pytest.fixture
def beside(server, good, baseline, memory):
    """``beside(name, work, allowed)``: run a coroutine beside good clients, who get their answers in time."""

    def run(name, work, allowed=0.0):
        clients = GoodClients(lambda: server.url, good, GOOD)
        clients.answers = baseline.answers
        began = time.monotonic()

        async def both():
            async with session() as asked, clients.busy(asked):
                return await work(asked)

        result = asyncio.run(both())
        slowest = [max(times) for times in clients.seconds]
        took = ', '.join(
            f'{what} {median(times):.2f} s, at most {longest:.2f} s ({longest / rest:.1f} times)'
            for what, times, longest, rest in zip(
                ('text', 'picture'), clients.seconds, slowest, baseline.slowest, strict=True
            )
        )
        answers = sum(map(len, clients.seconds))
        say(f'{name}: {result} in {time.monotonic() - began:.0f} s; {answers} good answers beside: {took}')
        assert server.alive() and not clients.faults, '\n'.join(clients.faults)
        for now, then in zip(slowest, baseline.slowest, strict=True):
            assert now <= SLOWER * then + allowed

    return run


@pytest.mark.parametrize('kind', ['pictures', 'bodies', 'schema'])
def test_hostile_requests(server, files, beside, kind):
    clients = HostileClients(server.url, HOSTILE)

    async def work(asked):
        await clients.send(asked, hostile(kind, server, files, COUNT))
        return f'{COUNT} requests, {dict(clients.statuses)}'

    beside(kind, work)
    assert not clients.faults, '\n'.join(clients.faults)


def test_clients_that_leave(server, files, beside):
    bodies = [
        make(stream=stream, max_tokens=1000, ignore_eos=True)
        for stream in (True, False)
        for make in (lambda **more: chat('Count.', **more), lambda **more: with_picture(files['PNG'], **more))
    ]

    async def work(asked):
        left = await leave(asked, server.url, bodies, LEAVING, seed=3)
        assert left == LEAVING
        return f'{left} clients left'

    beside('leaving', work)


def test_the_engine_is_stopped_again_and_again(server, beside):
    process = engine(server)

    async def work(asked):
        told = []
        for _ in range(STOPS):
            process.suspend()
            began = time.monotonic()
            while True:
                async with asked.get(server.url + '/health') as answer:
                    if answer.status == 503:
                        break
            told.append(time.monotonic() - began)
            await asyncio.sleep(STOPPED)
            process.resume()
            await asyncio.sleep(STOPPED / 2)
        return f'{STOPS} stops, /health bad after at most {max(told):.2f} s'

    beside('stopped', work, allowed=2 * STOPPED)


def test_nothing_stays_behind(server, baseline, memory):
    now = at_rest(server, lambda found: not found.more_than(baseline.rest, **LEFT))
    say(f'afterwards: {now}; highest {memory.highest}')
    assert not now.more_than(baseline.rest, **LEFT)
    bound = MEMORY / 2**20
    assert memory.highest['api'] <= baseline.rest.api_memory + bound + API_SLACK
    assert memory.highest['engine'] <= baseline.rest.engine_memory + ENGINE_SLACK
    assert 'Traceback' not in server.log_text()


def test_the_engine_is_killed_again_and_again(make_checkpoint, good, baseline, tmp_path):
    server = make_server(make_checkpoint(), tmp_path / 'log')
    clients = GoodClients(lambda: server.url, good, GOOD, may_fail=True)
    clients.answers = baseline.answers
    told = []

    async def supervise():
        """Kill the engine and start the server again, as a supervisor does when it has ended with an error."""
        for _ in range(KILLS):
            children = psutil.Process(server.pid).children(recursive=True)
            answered = sum(map(len, clients.seconds))
            while sum(map(len, clients.seconds)) < answered + GOOD:
                await asyncio.sleep(0.05)
            engine(server).kill()
            began = time.monotonic()
            assert await asyncio.to_thread(server.wait_until_ended) == 1
            told.append(time.monotonic() - began)
            assert psutil.wait_procs(children, HANG)[1] == []
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(server.wait_until_ready)

    async def run():
        async with session() as asked, clients.busy(asked):
            await supervise()

    with server:
        asyncio.run(run())
    say(
        f'killed: {KILLS} times, the server ended after at most {max(told):.2f} s; '
        f'{sum(map(len, clients.seconds))} good answers, {sum(clients.refused.values())} refused'
    )
    assert not clients.faults, '\n'.join(clients.faults)
    assert not any('TimeoutError' in why for why in clients.refused)
