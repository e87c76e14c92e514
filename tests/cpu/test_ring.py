"""LMDeploy's ring of messages between processes: a rank that waits at its end still does what another one waits for."""

import asyncio
import contextlib
import copy
import gc
import multiprocessing
import threading

import pytest
from lmdeploy.pytorch.engine.executor.mp_executor import NUM_SHARED_BLOCK, SHARED_BLOCK_SIZE, Notifier, SharedBuffer
from waiting import HANG

from lmdeploy_vico.cpu import patches
from lmdeploy_vico.patching import Trigger

STUCK = 5  # seconds after which the two ranks of a test that shows the fault are taken apart


class Message:
    """In place of a call: what the patch is given."""

    def __init__(self, buffer):
        self.instance = buffer

    def proceed(self):
        return self.instance.receive_async()


class Ring:
    """A sender and two ranks, each in a thread; the next message begins one package before the end of the ring."""

    def __init__(self):
        context = multiprocessing.get_context('spawn')
        self.notifier = Notifier(2, context)
        self.sender = SharedBuffer(-1, self._at_the_end(self.notifier))
        self.ranks = [
            SharedBuffer(rank, self._at_the_end(copy.copy(self.notifier)), self.sender.name()) for rank in range(2)
        ]
        for buffer in (self.sender, *self.ranks):
            buffer._buf_id = NUM_SHARED_BLOCK - 2

    @staticmethod
    def _at_the_end(notifier):
        notifier._event_id = NUM_SHARED_BLOCK - 2
        return notifier

    def close(self):
        gc.collect()  # what was taken apart has errors that refer to the shared memory
        for buffer in (*self.ranks, self.sender):
            buffer.close()


@pytest.fixture
def ring():
    ring = Ring()
    yield ring
    ring.close()


def exchange(ring, receive):
    """Send a message of two packages to both ranks; the second is busy until a task of the first one's loop has run.

    Returns:
        What the ranks received; None for one that was taken apart.
    """
    message, started, received = b'x' * (SHARED_BLOCK_SIZE + 9), threading.Event(), [None, None]

    async def first():
        task = asyncio.get_running_loop().create_task(look())
        received[0] = await receive(ring.ranks[0])
        await task

    async def look():
        """As a forward that is started when the loop comes to it: after the first package, before the ring's end."""
        while ring.ranks[0].notifier._event_id != NUM_SHARED_BLOCK - 1:
            await asyncio.sleep(0)
        started.set()

    async def second():
        if started.wait(STUCK):  # as gloo does in a collective: the loop stands
            received[1] = await receive(ring.ranks[1])
        else:
            ring.notifier.bar.abort()

    def run(coroutine):
        with contextlib.suppress(threading.BrokenBarrierError):
            asyncio.run(coroutine())

    def send():
        with contextlib.suppress(threading.BrokenBarrierError):
            ring.sender.send(message)

    threads = [threading.Thread(target=run, args=(one,)) for one in (first, second)] + [threading.Thread(target=send)]
    threads[2].start()  # all is in the ring before anybody looks
    assert ring.notifier.events[NUM_SHARED_BLOCK - 1].wait(HANG)
    for thread in threads[:2]:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    return [one == message for one in received]


def test_a_rank_goes_on_while_it_waits_for_the_others(ring, monkeypatch):
    monkeypatch.setattr(patches.register, 'reached', lambda trigger: trigger is Trigger.CPU_ENGINE)
    assert exchange(ring, lambda buffer: patches.receive_beside_the_loop(Message(buffer))) == [True, True]


def test_lmdeploy_alone_stands(ring):
    """If this fails, LMDeploy has mended it and the patch can go."""
    assert exchange(ring, SharedBuffer.receive_async) == [False, False]
