"""``benchmarks/serving/ranks.py``: every rank gets what was sent, and the loop's standstill is seen."""

import asyncio
import copy
import multiprocessing
import threading
import time

import pytest
from lmdeploy.pytorch.engine.executor.mp_executor import Notifier, SharedBuffer
from waiting import HANG

from benchmarks.serving import ranks
from benchmarks.serving.prompt_tokens import embeddings

SHAPE = (320, 64)
BLOCK = 0.05  # seconds


class Pipe:
    """The end of a pipe in the thread that receives."""

    def __init__(self):
        self.sent, self.any = [], threading.Condition()

    def send(self, value):
        with self.any:
            self.sent.append(value)
            self.any.notify()

    def take(self):
        with self.any:
            assert self.any.wait_for(lambda: self.sent, HANG)
            return self.sent.pop(0)


@pytest.fixture
def rank(monkeypatch):
    """``rank(change)``: a rank's thread, the rings to it, and its pipe; ``change`` is done to what it receives."""
    monkeypatch.setattr(ranks, 'keep_freed_memory', lambda: None)
    context, pipe = multiprocessing.get_context('spawn'), Pipe()
    notifiers = {form: Notifier(1, context) for form in ranks.FORMS}
    rings = {form: SharedBuffer(-1, notifiers[form]) for form in ranks.FORMS}
    theirs = {form: copy.copy(notifier) for form, notifier in notifiers.items()}  # as another process has them
    names = {form: ring.name() for form, ring in rings.items()}
    thread = threading.Thread(target=ranks.serve_rank, args=(0, theirs, names, pipe), daemon=True)
    thread.start()
    yield rings, pipe
    rings['LMDeploy'].send({'args': ()})
    thread.join(HANG)
    assert not thread.is_alive()
    for ring in rings.values():
        ring.close()


def test_a_rank_takes_each_form_in_turn_and_says_when(rank):
    rings, pipe = rank
    ranks.know_rings(rings['plugin'].name())
    executor = ranks.Executor(rings['plugin'])
    for _ in range(2):
        for form in ranks.FORMS:
            inputs, began = ranks.step(embeddings(*SHAPE), form), time.perf_counter()
            message = {'method': 'forward_async', 'args': (inputs,), 'kwargs': {}, 'return_mask': 0}
            if form == 'plugin':
                asyncio.run(ranks.call_ranks(executor, message, ranks.ALL))
            else:
                rings[form].send(message)
            assert began < pipe.take() < time.perf_counter()


def test_other_values_are_noticed():
    inputs = ranks.step(embeddings(*SHAPE).clone(), 'plugin')
    ranks.check(inputs)
    inputs['inputs'].vision_inputs.input_multimodals[0]['image'][0].data[3, 5] += 1
    with pytest.raises(AssertionError, match='other values'):
        ranks.check(inputs)


def test_a_loop_that_stands_is_seen(capsys):
    async def send(form, inputs):
        if form == 'LMDeploy':
            time.sleep(BLOCK)  # in the loop
        else:
            await asyncio.to_thread(time.sleep, BLOCK)
        now = time.perf_counter()

        async def arrivals():
            return [now + 1, now + 2]

        return arrivals

    one = asyncio.run(ranks.once(send, 'LMDeploy', {}))
    assert one['stands'] >= BLOCK * 1e3 * 0.9
    assert one['last'] - one['first'] == pytest.approx(1e3)
    row = ranks.row(
        [one, {key: 2 * value for key, value in one.items()}, {key: 9 * value for key, value in one.items()}]
    )
    assert row['messages'] == 3 and row['milliseconds']['last'] == pytest.approx(2 * one['last'], abs=0.01)
    assert row['least_milliseconds']['last'] == pytest.approx(one['last'], abs=0.01)
    ranks.show([{'executor': 'mp', 'ranks': 2, 'width': 64, 'by': 'LMDeploy', **row}])
    assert 'LMDeploy' in capsys.readouterr().out
