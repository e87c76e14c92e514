"""For how many tiles a place is held, before anything is decoded or checked, and for how long."""

import asyncio

import pytest

from lmdeploy_vico.adapter.server import disconnect
from lmdeploy_vico.adapter.server.admission import admitted, current_admission, estimate_tiles
from lmdeploy_vico.adapter.server.disconnect import ServedRequest
from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.pixels import PixelBudget, charge
from lmdeploy_vico.stage.queue import TileQueue

pytestmark = pytest.mark.busy

IMAGE = {'type': 'image_url', 'image_url': {'url': 'x'}}
SEQUENCE = 'data:video/jpeg;base64,' + ','.join('abc')


def image(**params):
    return {'type': 'image_url', 'image_url': {'url': 'x', **params}}


def video(url='x', **params):
    return {'type': 'video_url', 'video_url': {'url': url, **params}}


def estimate(content, options=None, session_len=6400):
    return estimate_tiles([{'role': 'user', 'content': content}, 'x'], options, 13, 40, session_len)


@pytest.mark.parametrize(
    'content, least, most',
    [
        ([IMAGE, {'type': 'text', 'text': 'x'}, IMAGE], 2, 26),
        ([image(detail='high'), image(max_dynamic_patch=40), image(max_dynamic_patch=1)], 3, 25 + 41 + 2),
        ([image(detail='huge'), {'type': 'image', 'image': 'x', 'max_dynamic_patch': 3}], 2, 13 + 4),
        ([video()], 1, 64),
        ([video(num_frames=8), IMAGE, video(num_frames=3)], 3, 8 + 13 + 3),
        ([video(num_frames='x'), {'type': 'video', 'video': 'x', 'num_frames': 5}], 2, 32 + 5),
        ([video(num_frames=-1)], 1, 101),  # what is decoded at most
        ([video(SEQUENCE, num_frames=2), video(SEQUENCE, num_frames=9)], 2, 2 + 3),
        (['x', None, {'type': ['video']}, {'type': 'video_url', 'video_url': None}], 1, 32),
        ('text', 0, 0),
        (None, 0, 0),
    ],
)
def test_estimate(content, least, most):
    assert estimate(content, {'video': {'num_frames': 64}}) == (least, most)


def test_a_sequence_of_jpegs_brings_its_own_number():
    assert estimate([video(SEQUENCE)]) == (1, 3)


@pytest.mark.parametrize('options', [None, {}, {'video': None}, {'video': 5}, 5, 'x'])
def test_lmdeploys_default(options):
    assert estimate([video()], options) == (1, 32)


def test_without_a_session_length():
    assert estimate([video(num_frames=500), IMAGE], session_len=None) == (2, 513)


class Stage:
    def __init__(self, capacity):
        self.queue = TileQueue(capacity)
        self.admit, self.release = self.queue.admit, self.queue.release


def test_a_place_is_held_while_a_request_is_prepared():
    async def run():
        stage = Stage(10)
        async with admitted(stage, 10, PixelBudget(None)):
            assert current_admission().size == 10
            with pytest.raises(OverloadError, match='Try again later'):
                async with admitted(stage, 1, PixelBudget(None)):
                    pass
        assert current_admission() is None
        stage.queue.admit(10)

    asyncio.run(run())


def test_all_choices_of_a_request_share_a_place():
    async def choice(stage, pixels, begun, end):
        async with admitted(stage, 8, pixels):
            charge(30)
            begun.release()
            await end.wait()
            return current_admission()

    async def run():
        stage, pixels, begun, end = Stage(10), PixelBudget(200), asyncio.Semaphore(0), asyncio.Event()
        disconnect._served.set(ServedRequest())
        choices = [asyncio.create_task(choice(stage, pixels, begun, end)) for _ in range(5)]
        for _ in choices:
            await begun.acquire()
        assert pixels.taken == 5 * 30  # each choice decodes for itself
        with pytest.raises(OverloadError):
            await asyncio.create_task(choice_of_another(stage))
        end.set()
        assert len({id(place) for place in await asyncio.gather(*choices)}) == 1
        assert pixels.taken == 0
        stage.queue.admit(10)

    async def choice_of_another(stage):
        disconnect._served.set(ServedRequest())
        async with admitted(stage, 8, PixelBudget(None)):
            pass

    asyncio.run(run())


@pytest.mark.parametrize('end', [ValueError, OverloadError, asyncio.CancelledError])
def test_memory_comes_back_however_a_request_ends(end):
    async def run():
        pixels = PixelBudget(100)
        with pytest.raises(end):
            async with admitted(Stage(10), 1, pixels):
                charge(70)
                assert pixels.taken == 70
                raise end('x')
        assert pixels.taken == 0

    asyncio.run(run())
