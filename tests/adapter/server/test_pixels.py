"""Memory for decoded pictures: never more than there is, nobody waits, and all of it comes back."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
from adapter.server.counting import counting
from waiting import HANG

from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.served import PixelBudget, PixelShare, TooLargeError, charge, decoding, served_request


def test_a_request_that_alone_is_too_large():
    budget = PixelBudget(100)
    share = PixelShare(budget)
    with share.in_use():
        share.take(60)
        with pytest.raises(TooLargeError, match=r'at least 101 bytes of memory, more than the limit of 100 \(option '):
            share.take(41)
        share.take(40)  # what was refused has not been counted
        assert budget.taken == 100
    assert budget.taken == 0


def test_a_request_that_does_not_fit_beside_others():
    budget = PixelBudget(100)
    first, second = PixelShare(budget), PixelShare(budget)
    with second.in_use():
        with first.in_use():
            first.take(60)
            second.take(30)
            with pytest.raises(
                OverloadError, match=r'take 90 bytes of memory, and 11 more .* of 100 .*Try again later'
            ):
                second.take(11)
            with pytest.raises(TooLargeError):  # trying again would not help
                second.take(71)
        second.take(70)
        assert budget.taken == 100
    assert budget.taken == 0


def test_without_a_limit():
    share = PixelShare(PixelBudget(None))
    with share.in_use():
        share.take(10**15)


def test_nothing_is_counted_outside_of_requests():
    charge(10**15)
    with decoding():
        charge(10**15)


@pytest.mark.busy
def test_a_thread_that_decodes_for_a_client_that_has_left():
    budget, reading, go_on = PixelBudget(100), threading.Event(), threading.Event()

    @decoding()
    def decode():
        charge(50)
        reading.set()
        assert go_on.wait(HANG)
        charge(20)

    with ThreadPoolExecutor(1) as threads:
        with counting(budget):
            thread = threads.submit(copy_context().run, decode)
            assert reading.wait(HANG)
        assert budget.taken == 50  # still there, though the request has ended
        go_on.set()
        thread.result(30)
    assert budget.taken == 0


@pytest.mark.busy
def test_many_threads():
    budget = PixelBudget(1000)
    refused = []

    @decoding()
    def decode(size):
        try:
            charge(size)
        except OverloadError:
            refused.append(size)
        assert 0 <= budget.taken <= 1000
        if size % 7 == 0:
            raise RuntimeError(size)

    def request(seed):
        sizes = [random.Random(seed).randrange(1, 120) for _ in range(8)]
        with counting(budget), ThreadPoolExecutor(4) as threads:
            for future in [threads.submit(copy_context().run, decode, size) for size in sizes]:
                future.exception(30)

    with ThreadPoolExecutor(8) as clients:
        for future in [clients.submit(request, seed) for seed in range(200)]:
            future.result(60)
    assert budget.taken == 0 and served_request() is None
