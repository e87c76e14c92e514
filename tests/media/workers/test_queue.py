"""Clients take turns."""

import threading

import pytest
from waiting import HANG

from lmdeploy_vico.media.workers.queue import FairQueue


def taken(queue, count):
    """The jobs that are taken, each being done before the next is taken."""
    jobs = []
    for _ in range(count):
        client, job = queue.take()
        jobs.append(job)
        queue.done(client)
    return jobs


def test_clients_take_turns_however_much_one_sends():
    queue = FairQueue(2)
    for number in range(4):
        queue.put('a', f'a{number}')
    queue.put('b', 'b0')
    queue.put('c', 'c0')
    queue.put('b', 'b1')
    assert taken(queue, 7) == ['a0', 'b0', 'c0', 'a1', 'b1', 'a2', 'a3']


def test_one_client_never_has_all_workers():
    queue = FairQueue(3)
    for number in range(5):
        queue.put('a', number)
    assert [queue.take() for _ in range(2)] == [('a', 0), ('a', 1)]
    queue.put('b', 'other')
    assert queue.take() == ('b', 'other')
    queue.done('a')
    assert queue.take() == ('a', 2)


def test_a_single_worker_serves_everybody():
    queue = FairQueue(1)
    queue.put('a', 1)
    assert queue.take() == ('a', 1)


@pytest.mark.busy
def test_a_worker_waits_for_a_job_that_may_run():
    queue = FairQueue(2)
    queue.put('a', 1)
    queue.put('a', 2)
    queue.take()
    found = []
    waiting = threading.Thread(target=lambda: found.append(queue.take()))
    waiting.start()
    queue.put('b', 3)  # a's second may not run yet
    waiting.join(HANG)
    assert found == [('b', 3)]


def test_what_is_dropped_is_not_taken():
    queue = FairQueue(2)
    queue.put('a', 1)
    queue.put('a', 2)
    assert queue.drop('a', 1) and not queue.drop('a', 1) and not queue.drop('b', 2)
    assert queue.take() == ('a', 2)
    assert not queue.drop('a', 2)


@pytest.mark.busy
def test_closing():
    queue = FairQueue(2)
    found = []
    waiting = threading.Thread(target=lambda: found.append(queue.take()))
    waiting.start()
    assert queue.close() == []
    waiting.join(HANG)
    assert found == [None]
    with pytest.raises(RuntimeError):
        queue.put('a', 1)
    full = FairQueue(2)
    full.put('a', 1)
    assert full.close() == [1] and full.take() is None
