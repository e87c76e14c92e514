"""Looking up hosts: nobody waits for the name servers of somebody else."""

import asyncio
import socket
import threading

import pytest

from lmdeploy_vico.media import resolver
from lmdeploy_vico.media.resolver import THREADS, Resolver

ADDRESS = '93.184.216.34'


@pytest.fixture
def names(monkeypatch):
    """A resolver, whose look-ups of "stuck" end when the event that is returned with it is set."""
    release, stuck = threading.Event(), threading.Semaphore(0)

    def getaddrinfo(host, port, **options):
        if host == 'stuck':
            stuck.release()
            release.wait()
        if host == 'missing':
            raise socket.gaierror(-2, 'Name or service not known')
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (ADDRESS, port))]

    monkeypatch.setattr(resolver.socket, 'getaddrinfo', getaddrinfo)
    made = Resolver()
    yield made, release, stuck
    release.set()
    made.close()


def test_addresses(names):
    found = asyncio.run(names[0].addresses('example.com', 80, 'a'))
    assert found == [(socket.AF_INET, ADDRESS)]
    with pytest.raises(OSError, match='not known'):
        asyncio.run(names[0].addresses('missing', 80, 'a'))


def test_name_servers_that_never_answer_hold_their_own_client_only(names):
    made, _, stuck = names

    async def run():
        waiting = [asyncio.create_task(made.addresses('stuck', 80, 'bad')) for _ in range(2 * THREADS)]
        for _ in range(THREADS - 1):
            await asyncio.to_thread(stuck.acquire)
        assert await made.addresses('example.com', 80, 'good') == [(socket.AF_INET, ADDRESS)]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        # Those who gave up have no more turns; their threads are still held.
        assert await made.addresses('example.com', 80, 'good') == [(socket.AF_INET, ADDRESS)]
        assert not stuck.acquire(blocking=False)

    asyncio.run(run())


def test_threads_end(names):
    made, release, _ = names
    asyncio.run(made.addresses('example.com', 80, 'a'))
    made.close()
    release.set()
    for thread in made._threads:
        thread.join()
