"""Messages of megabytes in LMDeploy's ring: the same bytes, each copied once, and written in a thread."""

import asyncio
import contextlib
import copy
import inspect
import multiprocessing
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from lmdeploy.pytorch.engine.executor.mp_executor import NUM_SHARED_BLOCK, SHARED_BLOCK_SIZE, Notifier, SharedBuffer
from lmdeploy.pytorch.model_inputs import VisionModelInputs
from waiting import HANG

from lmdeploy_vico.adapter.engine import ring
from lmdeploy_vico.adapter.engine.ranks import SHARED_MEMORY
from lmdeploy_vico.adapter.engine.spans import VisualSpan
from lmdeploy_vico.adapter.patches import ranks

MIB = SHARED_BLOCK_SIZE
PICKLE = 22  # bytes that the pickle of bytes takes beside them
SPAN = VisualSpan(data=torch.zeros(1, 4), start=0, end=1)
SIZES = [0, 9, MIB - PICKLE, MIB, MIB + 1, 3 * MIB + 7, (NUM_SHARED_BLOCK + 2) * MIB]


class Call:
    """As the register's: what a patch is given of a method of ``instance``."""

    def __init__(self, instance, original, **arguments):
        self.instance, self._original, self._arguments = instance, original, arguments

    def __getitem__(self, name):
        return self._arguments[name]

    def proceed(self):
        return self._original(self.instance, **self._arguments)


class LMDeploysBuffer(SharedBuffer):
    """As it was before the plugin, which is attached to this process too, changed it."""

    pack_data, close, _receive_step0 = (
        inspect.unwrap(one) for one in (SharedBuffer.pack_data, SharedBuffer.close, SharedBuffer._receive_step0)
    )


class PluginsBuffer(LMDeploysBuffer):
    """LMDeploy's buffer with the plugin's changes."""

    def pack_data(self, data, receiver_mask):
        return ranks.cut_without_copies(Call(self, LMDeploysBuffer.pack_data, data=data, receiver_mask=receiver_mask))

    def close(self):
        ranks.close_when_nobody_writes(Call(self, LMDeploysBuffer.close))

    def _receive_step0(self):
        return ranks.collect_without_copies(Call(self, LMDeploysBuffer._receive_step0))


@pytest.fixture
def buffers():
    """``buffers(sender, receiver)``: a ring of one rank with buffers of these classes on both sides."""
    made = []

    def make(sender, receiver):
        notifier = Notifier(1, multiprocessing.get_context('spawn'))
        made.append(sender(-1, notifier))
        made.append(receiver(0, copy.copy(notifier), made[0].name()))  # as another process has it
        return made

    yield make
    for one in reversed(made):
        one.close()


def send(sender, receiver, messages, receivers=1):
    """What the receiver gets of messages."""
    thread = threading.Thread(target=lambda: [sender.send(one, receivers) for one in messages], daemon=True)
    thread.start()
    got = [receiver.receive() for _ in messages]
    thread.join(HANG)
    return got


@pytest.mark.parametrize('sender', [LMDeploysBuffer, PluginsBuffer])
@pytest.mark.parametrize('receiver', [LMDeploysBuffer, PluginsBuffer])
def test_either_side_understands_the_other(buffers, sender, receiver):
    sending, receiving = buffers(sender, receiver)
    ring.know_rings(sending.name())
    messages = [bytes(range(256)) * (size // 256) + b'x' * (size % 256) for size in SIZES]
    assert send(sending, receiving, messages) == messages
    assert sending._buf_id == receiving._buf_id


def test_a_ring_is_closed_while_a_thread_waits_to_write_on(buffers):
    """Nobody reads: the thread waits at the ring's end, until it is told that the other side has ended."""
    sending, _ = buffers(PluginsBuffer, LMDeploysBuffer)
    ring.know_rings(sending.name())
    executor = SimpleNamespace(comm_buf=sending, ret_bufs=[])

    async def run():
        message = step(VisualSpan(data=torch.zeros(NUM_SHARED_BLOCK + 1, MIB // 4), start=0, end=1))
        forward = asyncio.ensure_future(call(executor, 'forward_async', message))
        while not sending.notifier.bar.n_waiting:
            await asyncio.sleep(0)
        forward.cancel()
        with pytest.raises(asyncio.CancelledError):
            await forward
        sending.close()

    asyncio.run(asyncio.wait_for(run(), HANG))
    assert sending.is_closed and not (SHARED_MEMORY / sending.name()).exists()


class SlowBuffer(PluginsBuffer):
    """Writing a package takes until the test says so."""

    writes, go_on = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def acquire_buf(self):
        with super().acquire_buf() as package:
            self.writes.set()
            assert self.go_on.wait(HANG)
            yield package


def test_a_ring_is_closed_when_the_package_is_written(buffers):
    sending, _ = buffers(SlowBuffer, LMDeploysBuffer)
    ring.know_rings(sending.name())
    executor = SimpleNamespace(comm_buf=sending, ret_bufs=[])
    message = {'method': 'forward_async', 'args': [step(SPAN)], 'kwargs': {}, 'return_mask': 0}
    writing = threading.Thread(target=lambda: asyncio.run(ring.call_ranks(executor, message, 1)), daemon=True)
    writing.start()
    assert sending.writes.wait(HANG)
    closing = threading.Thread(target=sending.close, daemon=True)
    closing.start()
    while not sending.notifier.bar.broken:
        assert closing.is_alive()
        time.sleep(0.01)
    sending.go_on.set()
    for one in (writing, closing):
        one.join(HANG)
    assert sending.is_closed and not (SHARED_MEMORY / sending.name()).exists()


def test_a_message_for_others_is_passed_over(buffers):
    sending, receiving = buffers(PluginsBuffer, PluginsBuffer)
    ring.know_rings(sending.name())
    assert send(sending, receiving, [b'x' * (3 * MIB)], receivers=2) == [None]


@pytest.mark.parametrize(('known', 'times'), [(True, 1), (False, 2)], ids=['once', 'of another model: as before'])
def test_what_is_left_is_not_copied(buffers, known, times):
    """LMDeploy holds the message and what is left of it: nearly twice its size after the first package."""
    sending, _ = buffers(PluginsBuffer, LMDeploysBuffer)
    if known:
        ring.know_rings(sending.name())
    message = b'x' * (20 * MIB)
    tracemalloc.start()
    try:
        packages = sending.pack_data(message, 1)
        next(packages)
        tracemalloc.reset_peak()
        next(packages)
        assert round(tracemalloc.get_traced_memory()[1] / len(message)) == times
    finally:
        tracemalloc.stop()
        packages.close()


def test_what_comes_is_not_copied_again(buffers):
    sending, receiving = buffers(LMDeploysBuffer, PluginsBuffer)
    assert type(step_of(sending, receiving)) is bytes
    ring.know_rings(sending.name())
    assert type(step_of(sending, receiving)) is bytearray


def step_of(sending, receiving):
    sending.send(b'x', 1)
    with receiving.notifier.wait():
        return receiving._receive_step0()[0]


class Executor:
    """As LMDeploy's: what is sent is noted with the thread that sends it, and may be held up."""

    def __init__(self):
        self.sent, self.go_on, self.began = [], threading.Event(), threading.Event()
        self.comm_buf = self
        self.ret_bufs = [SimpleNamespace(receive_async=lambda rank=rank: self.result(rank)) for rank in range(3)]

    def send(self, message, receiver_mask):
        self.began.set()
        if message['method'] == 'forward_async':
            assert self.go_on.wait(HANG)
        self.sent.append((message['method'], receiver_mask, threading.current_thread() is threading.main_thread()))

    async def result(self, rank):
        return f'of rank {rank}'


def step(*spans):
    vision = VisionModelInputs(input_multimodals=[{'image': list(spans)}])
    return {'inputs': SimpleNamespace(vision_inputs=vision)}


def call(executor, method, *args, wanted=0, receivers=0xFF):
    message = {'method': method, 'args': args, 'kwargs': {}, 'return_mask': wanted}
    return ring.call_ranks(executor, message, receivers)


def test_visual_tokens_are_sent_in_a_thread_and_nothing_comes_between():
    executor = Executor()

    async def run():
        forward = asyncio.ensure_future(call(executor, 'forward_async', step(SPAN)))
        while not executor.began.is_set():
            await asyncio.sleep(0)
        outputs = asyncio.ensure_future(call(executor, 'get_outputs', wanted=1, receivers=1))
        for _ in range(5):
            await asyncio.sleep(0)  # the loop goes on, and what it sends waits
        assert executor.sent == []
        executor.go_on.set()
        return await forward, await outputs

    assert asyncio.run(asyncio.wait_for(run(), HANG)) == (None, ['of rank 0', None, None])
    assert executor.sent == [('forward_async', 0xFF, False), ('get_outputs', 1, False)]


def test_everything_else_is_sent_at_once():
    executor = Executor()
    executor.go_on.set()
    asyncio.run(call(executor, 'forward_async', step()))
    assert asyncio.run(call(executor, 'get_outputs', wanted=5, receivers=5)) == ['of rank 0', None, 'of rank 2']
    assert executor.sent == [('forward_async', 0xFF, True), ('get_outputs', 5, True)]
    assert not ring.lock_of(executor.comm_buf).locked()


def test_the_ring_is_free_after_an_error():
    executor = Executor()
    executor.send = None
    for args in ((), (step(SPAN),)):
        with pytest.raises(TypeError):
            asyncio.run(call(executor, 'forward_async', *args))
    assert not ring.lock_of(executor.comm_buf).locked()
