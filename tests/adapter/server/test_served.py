"""How long a request holds its place in the stage, and memory for its pictures."""

import asyncio

import pytest

from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.served import ServedRequest, admitted, served_request, serving
from lmdeploy_vico.media.memory import MemoryBudget
from lmdeploy_vico.stage.queue import TileQueue

pytestmark = pytest.mark.busy


class Stage:
    def __init__(self, capacity):
        self.queue = TileQueue(capacity)
        self.admit, self.release = self.queue.admit, self.queue.release


def test_a_place_is_held_while_a_request_is_prepared():
    async def run():
        stage = Stage(10)
        async with admitted(stage, 10, MemoryBudget(None)):
            assert served_request().admission.size == 10
            with serving(ServedRequest()), pytest.raises(OverloadError, match='Try again later'):
                async with admitted(stage, 1, MemoryBudget(None)):
                    pass
        assert served_request() is None
        stage.queue.admit(10)

    asyncio.run(run())


def test_all_choices_of_a_request_share_a_place():
    async def choice(stage, pixels, begun, end):
        async with admitted(stage, 8, pixels):
            served_request().pixels.take(30)
            begun.release()
            await end.wait()
            return served_request().admission

    async def run():
        stage, pixels, begun, end = Stage(10), MemoryBudget(200), asyncio.Semaphore(0), asyncio.Event()
        with serving(ServedRequest()):
            choices = [asyncio.create_task(choice(stage, pixels, begun, end)) for _ in range(5)]
        for _ in choices:
            await begun.acquire()
        assert pixels.taken == 5 * 30  # each choice decodes for itself
        with pytest.raises(OverloadError):
            await choice_of_another(stage)
        end.set()
        assert len({id(place) for place in await asyncio.gather(*choices)}) == 1
        assert pixels.taken == 0
        stage.queue.admit(10)

    async def choice_of_another(stage):
        async with admitted(stage, 8, MemoryBudget(None)):
            pass

    asyncio.run(run())


@pytest.mark.parametrize('end', [ValueError, OverloadError, asyncio.CancelledError])
def test_memory_comes_back_however_a_request_ends(end):
    async def run():
        pixels = MemoryBudget(100)
        with pytest.raises(end):
            async with admitted(Stage(10), 1, pixels):
                served_request().pixels.take(70)
                assert pixels.taken == 70
                raise end('x')
        assert pixels.taken == 0

    asyncio.run(run())
