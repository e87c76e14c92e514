"""Memory for what clients send: never more than there is, nobody waits, and all of it comes back."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmdeploy_vico.media.errors import MediaBusyError, MediaError
from lmdeploy_vico.media.memory import MemoryBudget, MemoryShare


def test_a_request_that_alone_is_too_large():
    budget = MemoryBudget(100)
    share = MemoryShare(budget)
    with share.in_use():
        share.take(60)
        with pytest.raises(MediaError, match=r'at least 101 bytes of memory, more than the limit of 100 \(option '):
            share.take(41)
        share.take(40)  # what was refused has not been counted
        assert budget.taken == 100
    assert budget.taken == 0


def test_a_request_that_does_not_fit_beside_others():
    budget = MemoryBudget(100)
    first, second = MemoryShare(budget), MemoryShare(budget)
    with second.in_use():
        with first.in_use():
            first.take(60)
            second.take(30)
            with pytest.raises(MediaBusyError, match=r'take 90 bytes of memory, and 11 more .* of 100 .*Try again'):
                second.take(11)
            with pytest.raises(MediaError):  # trying again would not help
                second.take(71)
        second.take(70)
        assert budget.taken == 100
    assert budget.taken == 0


def test_without_a_limit():
    share = MemoryShare(MemoryBudget(None))
    with share.in_use():
        share.take(10**15)


def test_work_that_goes_on_after_its_request():
    budget = MemoryBudget(100)
    share = MemoryShare(budget)
    with share.in_use():
        with share.in_use():
            share.take(50)
        assert budget.taken == 50
        with share.for_a_while() as take:
            take(20)
            take(10)
            assert budget.taken == 80
        assert budget.taken == 50
        share.give_back(20)
        assert budget.taken == 30
    assert budget.taken == 0


def test_for_a_while_outlives_the_request():
    budget = MemoryBudget(100)
    share = MemoryShare(budget)
    with share.in_use():
        work = share.for_a_while()
        take = work.__enter__()
        take(40)
    assert budget.taken == 40
    work.__exit__(None, None, None)
    assert budget.taken == 0


def test_what_nobody_would_give_back_is_not_taken():
    with pytest.raises(AssertionError):
        MemoryShare(MemoryBudget(10)).take(1)


def test_shares_of_one_request_have_to_fit_together():
    budget = MemoryBudget(100)
    body = MemoryShare(budget)
    pixels = MemoryShare(budget, body)
    with body.in_use(), pixels.in_use():
        body.take(30)
        with pytest.raises(MediaError, match='at least 101 bytes'):
            pixels.take(71)


@pytest.mark.busy
def test_a_request_waits_for_what_it_gives_back_itself():
    """Pictures of one request that are decoded side by side take more than one after the other."""
    budget = MemoryBudget(100)
    share, other = MemoryShare(budget), MemoryShare(budget)
    with share.in_use(), other.in_use(), ThreadPoolExecutor(1) as thread:
        other.take(10)
        share.take(60, passing=40)
        with pytest.raises(MediaBusyError):  # of what others give back nothing is known
            other.take(60, wait=True)
        waiting = thread.submit(share.take, 60, passing=40, wait=True)
        with pytest.raises(MediaBusyError):
            share.take(40)  # who does not want to wait does not
        assert not waiting.done()
        share.give_back(40, 40)
        waiting.result(60)
        assert budget.taken == 10 + 20 + 60
        with pytest.raises(MediaError):  # it would not fit with everything given back
            share.give_back(40, 40)
            share.take(90, wait=True)
    assert budget.taken == 0


@pytest.mark.busy
def test_many_threads():
    budget = MemoryBudget(1000)

    def decode(share, size):
        with share.in_use():
            try:
                share.take(size)
            except MediaBusyError:
                return
            assert 0 <= budget.taken <= 1000
            if size % 3 == 0:
                share.give_back(size // 2)

    def request(seed):
        sizes = [random.Random(seed).randrange(1, 120) for _ in range(8)]
        share = MemoryShare(budget)
        with share.in_use(), ThreadPoolExecutor(4) as threads:
            for future in [threads.submit(decode, share, size) for size in sizes]:
                future.result(60)

    with ThreadPoolExecutor(8) as clients:
        for future in [clients.submit(request, seed) for seed in range(200)]:
            future.result(60)
    assert budget.taken == 0
