"""Items are decoded side by side, and come back as LMDeploy parses them one after the other."""

import asyncio
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from lmdeploy.serve.processors.multimodal import MultimodalProcessor
from parity.conversations import data_url, video_url
from parity.videos import moving_crops, write_video
from PIL import Image
from waiting import HANG

from lmdeploy_vico.adapter.server.disconnect import while_client_waits
from lmdeploy_vico.adapter.server.items import Rules
from lmdeploy_vico.adapter.server.media import MediaParser
from lmdeploy_vico.adapter.server.overload import OverloadError
from lmdeploy_vico.adapter.server.request import parse_request
from lmdeploy_vico.adapter.server.served import ServedRequest, serving
from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel
from lmdeploy_vico.media.decoder import MediaDecoder
from lmdeploy_vico.media.errors import MediaBusyError, MediaError
from lmdeploy_vico.media.fetch import Fetcher
from lmdeploy_vico.media.loader import Files, MediaLoader
from lmdeploy_vico.media.memory import MemoryBudget, MemoryShare
from lmdeploy_vico.media.options import PictureOptions
from lmdeploy_vico.vision.tiling import Tiling, preparation_memory


def asked(messages, media_io_kwargs=None, session_len=8192):
    return parse_request(messages, media_io_kwargs, None, Rules(Tiling(1, 12), 40, session_len=session_len))


@pytest.fixture(scope='module')
def loader():
    decoder = MediaDecoder(2)
    yield MediaLoader(decoder, Fetcher(10**8, HANG), Files(), 10**8, PictureOptions())
    decoder.close()


class StandIn:
    """A loader whose pictures are made by a function of the URL, which may wait."""

    def __init__(self, load):
        self.load = load

    async def picture(self, url, origin, extra, keep):
        return await self.load(url, origin, extra)


def decode(loader, messages, media_io_kwargs=None, session_len=8192):
    """The jobs of each image and video."""
    return asyncio.run(MediaParser(loader)(asked(messages, media_io_kwargs, session_len))).jobs


def image(colour, **params):
    return {'type': 'image_url', 'image_url': {'url': data_url(Image.new('RGB', (9, 7), colour)), **params}}


def named(*names):
    """A message with images whose URLs are names."""
    return [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': name}} for name in names]}]


def text(value):
    return {'type': 'text', 'text': value}


@pytest.fixture(scope='module')
def video(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp('video') / 'coffee.mp4'
    return video_url(write_video(path, moving_crops(pictures['coffee'], 40)))


def test_only_the_processor_of_a_vico_model_is_changed():
    ours = VicoVisionModel.__new__(VicoVisionModel)
    ours.loader, ours.media_store = object(), None
    processor = MultimodalProcessor(None, None, vl_encoder=SimpleNamespace(model=ours))
    assert isinstance(processor.async_parse_multimodal_item, MediaParser)
    for encoder in (None, SimpleNamespace(model=object())):
        other = MultimodalProcessor(None, None, vl_encoder=encoder)
        assert other.async_parse_multimodal_item is MultimodalProcessor.async_parse_multimodal_item


def test_same_as_lmdeploy(loader, video):
    messages = [
        {'role': 'system', 'content': 'x'},
        {'role': 'user', 'content': [text('a'), image('red', detail='low'), text('b'), image('blue')], 'name': 'me'},
        {'role': 'assistant', 'content': None, 'tool_calls': [1]},
        {'role': 'assistant', 'tool_calls': [2]},
        {'role': 'assistant', 'content': [text('c'), text('d')]},
        {'role': 'tool', 'content': [image('green'), {'type': 'video_url', 'video_url': {'url': video}}]},
        {'role': 'user', 'content': []},
        {'role': 'user', 'content': [text('only')]},
    ]
    theirs = asyncio.run(MultimodalProcessor.async_parse_multimodal_item(messages))
    items = [item for message in theirs for item in message['content'] or () if 'data' in item]
    assert [item['type'] for item in items] == ['image', 'image', 'image', 'video']
    for jobs, item in zip(decode(loader, messages), items, strict=True):
        frames = item['data'] if item['type'] == 'video' else [item['data']]
        np.testing.assert_array_equal(pixels([job.image for job in jobs]), pixels(frames))


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.mark.busy
def test_images_of_one_message_are_decoded_at_the_same_time():
    async def load(url, origin, extra):
        there.append(url)
        if len(there) == 2:
            together.set()
        await asyncio.wait_for(together.wait(), HANG)
        return Image.new('RGB', (9, 7), url)

    there, together = [], asyncio.Event()
    found = decode(StandIn(load), named('red', 'blue'))
    assert [job.image.getpixel((0, 0)) for [job] in found] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.busy
def test_the_first_error_in_the_prompts_order_is_raised():
    async def load(url, origin, extra):
        if url == 'first':
            await asyncio.wait_for(second_failed.wait(), HANG)
        else:
            second_failed.set()
        raise MediaError(url)

    second_failed = asyncio.Event()
    with pytest.raises(ValueError, match='first'):
        decode(StandIn(load), named('first', 'second'))


def test_what_is_loaded_counts_for_the_request():
    async def load(url, origin, extra):
        origin.share.take(extra(300, 200))
        seen.append((origin.client, origin.allowed_hosts))
        return Image.new('RGB', (300, 200))

    async def run():
        share = MemoryShare(budget)
        with serving(ServedRequest(client='me', pixels=share)), share.in_use():
            found = await MediaParser(StandIn(load))(asked(named('a', 'b', 'c')), allowed_media_domains=['x'])
            grid = found.jobs[0][0].grid
            assert budget.taken == 3 * preparation_memory((300, 200), grid) and grid == Tiling(1, 12).grid((300, 200))

    seen, budget = [], MemoryBudget(10**9)
    asyncio.run(run())
    assert budget.taken == 0 and seen == [('me', ['x'])] * 3


def test_no_room_is_an_overload():
    async def load(url, origin, extra):
        raise MediaBusyError('no room. Try again later.')

    with pytest.raises(OverloadError, match='Try again later'):
        decode(StandIn(load), named('a'))


@pytest.mark.busy
def test_what_a_refused_request_has_sent_and_decoded_is_freed_at_once(monkeypatch):
    """Not when Python looks for cycles next, which may be long after gigabytes have been decoded again."""

    class Message(dict):
        pass

    async def load(url, origin, extra):
        if url == 'bad':
            while len(freed) < 2:
                await asyncio.sleep(0)
            raise MediaError('bad')
        if url == 'last':
            await asyncio.Event().wait()
        picture = Image.new('RGB', (9, 7))
        freed.append(weakref.ref(picture))
        return picture

    async def request():
        messages = [Message(named('good', 'bad', 'last')[0])]
        freed.append(weakref.ref(messages[0]))
        with pytest.raises(ValueError, match='bad'):
            await while_client_waits(lambda: asyncio.ensure_future(MediaParser(StandIn(load))(asked(messages))))

    async def run():
        await request()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        await asyncio.sleep(0)
        assert len(freed) == 2 and not any(thing() for thing in freed)

    freed = []
    monkeypatch.setattr('lmdeploy_vico.adapter.server.media.AT_ONCE', 3)
    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()


def test_a_lazy_picture_many_times_passes_untouched(loader, pictures, tmp_path):
    pictures['page'].save(tmp_path / 'page.png')
    with Image.open(tmp_path / 'page.png') as lazy:
        content = [{'type': 'image', 'image': lazy, 'max_dynamic_patch': 1}] * 50
        found = decode(loader, [{'role': 'user', 'content': content}])
        assert [job.image for [job] in found] == [lazy] * 50
        assert lazy.fp.tell() < (tmp_path / 'page.png').stat().st_size  # its pixels are not read yet


def test_num_frames_of_each_video(loader, video):
    def item(**params):
        return {'type': 'video_url', 'video_url': {'url': video, **params}}

    content = [item(), item(num_frames=3), item(num_frames=-1)]
    found = decode(loader, [{'role': 'user', 'content': content}], {'video': {'num_frames': 5}})
    assert [len(jobs) for jobs in found] == [5, 3, 40]
    [jobs] = decode(loader, [{'role': 'user', 'content': [item()]}])
    assert len(jobs) == 32
    # The 640 tokens that fit are at most 10 frames; one more shows that it is too long.
    with pytest.raises(ValueError, match=f'at least {11 * 64} visual tokens'):
        decode(loader, [{'role': 'user', 'content': [item(num_frames=-1)]}], session_len=640)


@pytest.mark.parametrize('wanted, count', [({}, 40), ({'num_frames': 3}, 3), ({'num_frames': -1}, 40)])
def test_frames_of_a_sequence_are_all_taken_unless_asked(loader, pictures, wanted, count):
    frames = [
        data_url(Image.fromarray(frame), 'JPEG').partition(',')[2] for frame in moving_crops(pictures['page'], 40)
    ]
    item = {'type': 'video_url', 'video_url': {'url': f'data:video/jpeg;base64,{",".join(frames)}', **wanted}}
    [jobs] = decode(loader, [{'role': 'user', 'content': [item]}])
    assert len(jobs) == count
