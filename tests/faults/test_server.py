"""Hostile requests, clients that leave, engines that are stopped and killed: good clients go on, nothing stays behind.

VICO_FAULTS says how many hostile requests of each kind (100 unless given). The tests run in their order, on one server
but for the last, with good clients beside each; ``-s`` shows a line of figures for each.
"""

import asyncio
import os
import random
import sys
import time
from pathlib import Path

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
BETWEEN = 100  # hostile requests that are one fault
WARM_UP = 40  # hostile requests of each kind, before the resources at rest are noted: pools are filled by then
QUIET = 96  # answers of good clients between two faults
SLOWER = 3.0  # times the slowest answer without a fault
MEMORY = 2**28  # bytes for what clients send
# MiB beyond that: allocators, thread stacks, and what the engine takes for a batch of tokens and grammars.
API_SLACK, ENGINE_SLACK = 128, 256
# MiB that allocators and the cache of encoded tiles may keep, and threads of pools that were not full. Measured after
# 17,000 requests: 97 MiB, 38 of them in the cache, and no more after 4,400 further ones.
LEFT = {'memory': 128, 'threads': 24}
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


@pytest.fixture(scope='module')
def rest(server, good, files):
    """What the server takes when its pools are filled and nobody asks."""

    async def run():
        clients = GoodClients(lambda: server.url, good, GOOD)
        async with session() as asked, clients.busy(asked):
            for kind in ('pictures', 'bodies', 'schema'):
                await HostileClients(server.url, HOSTILE).send(asked, hostile(kind, server, files, WARM_UP, seed=1))
        return clients.answers

    asyncio.run(run())
    resources = at_rest(server, lambda now: not any(now.gauges))
    say(f'at rest: {resources}')
    return resources


@pytest.fixture(scope='module')
def memory(server, rest):
    with HighestMemory(server) as watched:
        yield watched


@pytest.fixture
def beside(server, good, memory):
    """``beside(name, faults, allowed)``: do harm, one fault after the other, with good clients left alone in between.

    ``faults`` are functions of a session that return coroutines. The good clients get the same answers, and all in
    three times their time without a fault, or in so many seconds more as are allowed.
    """

    def run(name, faults, allowed=0.0):
        clients = GoodClients(lambda: server.url, good, GOOD)

        async def all_of_them():
            async with session() as asked, clients.busy(asked):
                for fault in faults:
                    await clients.some_quiet(QUIET)
                    with clients.fault():
                        await fault(asked)
                await clients.some_quiet(QUIET)

        began = time.monotonic()
        asyncio.run(all_of_them())
        slowest = [(max(beside), max(quiet)) for beside, quiet in zip(clients.beside, clients.quiet, strict=True)]
        times = ', '.join(
            f'{what} {beside:.2f} s at most ({beside / quiet:.1f} times {quiet:.2f} s)'
            for what, (beside, quiet) in zip(('text', 'picture'), slowest, strict=True)
        )
        say(f'{name} in {time.monotonic() - began:.0f} s; {clients.answered()} good answers: {times}')
        assert server.alive() and not clients.faults, '\n'.join(clients.faults)
        for beside, quiet in slowest:
            assert beside <= SLOWER * quiet + allowed

    return run


@pytest.mark.parametrize('kind', ['pictures', 'bodies', 'schema'])
def test_hostile_requests(server, files, beside, kind):
    requests = hostile(kind, server, files, COUNT)
    clients = HostileClients(server.url, HOSTILE)

    def hundred(start):
        return lambda asked: clients.send(asked, requests[start : start + BETWEEN])

    beside(f'{len(requests)} {kind}', [hundred(start) for start in range(0, len(requests), BETWEEN)])
    say(f'{kind}: {dict(clients.statuses)}')
    assert not clients.faults, '\n'.join(clients.faults)


def test_clients_that_leave(server, files, beside):
    rng, left = random.Random(3), []
    bodies = [
        make(stream=stream, max_tokens=1000, ignore_eos=True)
        for stream in (True, False)
        for make in (lambda **more: chat('Count.', **more), lambda **more: with_picture(files['PNG'], **more))
    ]

    async def some_leave(asked):
        left.append(await leave(asked, server.url, bodies * 2, rng))

    beside(f'{LEAVING} clients that leave', [some_leave] * (LEAVING // len(bodies * 2)))
    assert sum(left) == LEAVING


def test_the_engine_is_stopped_again_and_again(server, beside):
    process, told = engine(server), []

    async def stop(asked):
        process.suspend()
        began, status = time.monotonic(), 200
        while status != 503:
            async with asked.get(server.url + '/health') as answer:
                status = answer.status
        told.append(time.monotonic() - began)
        await asyncio.sleep(STOPPED)
        process.resume()

    beside(f'{STOPS} stops', [stop] * STOPS, allowed=2 * STOPPED)
    say(f'/health was bad after at most {max(told):.2f} s')


def test_nothing_stays_behind(server, rest, memory):
    now = at_rest(server, lambda found: not found.more_than(rest, **LEFT))
    say(f'afterwards: {now}; highest {memory.highest}')
    assert not now.more_than(rest, **LEFT)
    bound = MEMORY / 2**20
    assert memory.highest['api'] <= rest.api_memory + bound + API_SLACK
    assert memory.highest['engine'] <= rest.engine_memory + ENGINE_SLACK
    assert 'Traceback' not in server.log_text()


def test_the_engine_is_killed_again_and_again(make_checkpoint, good, tmp_path):
    server = make_server(make_checkpoint(), tmp_path / 'log')
    clients = GoodClients(lambda: server.url, good, GOOD, may_fail=True)
    told = []

    async def supervise():
        """Kill the engine and start the server again, as a supervisor does when it has ended with an error."""
        for _ in range(KILLS):
            children = psutil.Process(server.pid).children(recursive=True)
            await clients.some_quiet(GOOD)
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
        f'{clients.answered()} good answers, {sum(clients.refused.values())} refused'
    )
    assert not clients.faults, '\n'.join(clients.faults)
    assert not any('TimeoutError' in why for why in clients.refused)
