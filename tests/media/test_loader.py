"""From URLs to pictures."""

import asyncio

import numpy as np
import pytest
from aiohttp import web
from media.files import encoded, noise, pillow
from media.internet import Internet
from parity.conversations import data_url

from lmdeploy_vico.media.decoder import MediaDecoder
from lmdeploy_vico.media.errors import MediaError
from lmdeploy_vico.media.fetch import Fetcher
from lmdeploy_vico.media.loader import COPIES, Files, MediaLoader, Origin, in_order
from lmdeploy_vico.media.memory import MemoryBudget, MemoryShare
from lmdeploy_vico.media.options import PictureOptions, VideoOptions
from lmdeploy_vico.media.sources import NO_FILE

LIMIT = 1 << 20
PICTURE = encoded(noise(), 'PNG')
PIXELS = 56 * 40


@pytest.fixture
def loader():
    """``loader(files)``: all are closed at the end."""
    made = []

    def make(files=Files()):  # noqa: B008
        made.append(MediaLoader(MediaDecoder(2), Fetcher(LIMIT, 60), files, LIMIT, PictureOptions()))
        return made[-1]

    yield make
    for one in made:
        one.close()


def picture(loader, url, origin=None):
    return asyncio.run(loader.picture(url, origin or Origin(), lambda width, height: 0))


def sequence(count):
    return 'data:video/jpeg;base64,' + ','.join(data_url(noise(seed=n), 'JPEG').partition(',')[2] for n in range(count))


def test_from_everywhere(loader, tmp_path, monkeypatch):
    async def page(request):
        return web.Response(body=PICTURE)

    internet = Internet({'a': page})
    monkeypatch.setenv('http_proxy', internet.proxy)
    path = tmp_path / 'a.png'
    path.write_bytes(PICTURE)
    one = loader(Files(allowed=True))
    for url in (data_url(noise()), internet.url('a'), str(path), f'file://{path}'):
        np.testing.assert_array_equal(np.asarray(picture(one, url)), pillow(PICTURE))
    internet.stop()


def test_files_that_may_not_be_read(loader, tmp_path):
    (tmp_path / 'in').mkdir()
    for name in ('in/a.png', 'b.png'):
        (tmp_path / name).write_bytes(PICTURE)
    one = loader(Files(allowed=True, root=tmp_path / 'in'))
    picture(one, str(tmp_path / 'in/a.png'))
    for unread, url in ((one, tmp_path / 'b.png'), (loader(), tmp_path / 'in/a.png')):
        with pytest.raises(MediaError, match=NO_FILE):
            picture(unread, str(url))


def test_memory_of_a_picture(loader):
    budget = MemoryBudget(COPIES * len(PICTURE) + PIXELS * 11)
    share = MemoryShare(budget)
    one = loader()
    with share.in_use():
        picture(one, data_url(noise()), Origin(share=share))
        assert budget.taken == PIXELS * 4  # of its file nothing is left
        with pytest.raises(MediaError, match='more than the limit'):
            picture(one, data_url(noise()), Origin(share=share))
    assert budget.taken == 0


@pytest.mark.parametrize('wanted, expected', [(-1, range(10)), (4, [0, 3, 6, 9]), (1, [0]), (99, range(10))])
def test_a_sequence_of_jpegs(loader, wanted, expected):
    frames = asyncio.run(loader().video(sequence(10), Origin(), VideoOptions(num_frames=wanted)))
    assert len(frames) == len(expected)
    for frame, number in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(frame), pillow(encoded(noise(seed=number), 'JPEG')))


def test_a_damaged_sequence(loader):
    with pytest.raises(MediaError, match='A frame of the video cannot be read. The image is damaged'):
        asyncio.run(loader().video(sequence(3)[:-2000], Origin(), VideoOptions(num_frames=-1)))


# --- several at a time -----------------------------------------------------------------------------------------------


def test_the_first_error_in_order_and_nothing_goes_on():
    cancelled = []

    async def work(number, error=None, after=0):
        try:
            for _ in range(after):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        if error:
            raise ValueError(error)
        return number

    async def run():
        assert await in_order(work(number, after=9 - number) for number in range(9)) == list(range(9))
        works = [work(0), work(1, 'first', after=5), work(2, 'second'), work(3, after=10**9)]
        with pytest.raises(ValueError, match='first'):
            await in_order(works)
        await asyncio.sleep(0)
        assert cancelled == [3]

    asyncio.run(run())
