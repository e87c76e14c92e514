"""Items are decoded side by side, and come back as LMDeploy parses them one after the other."""

import asyncio
import gc
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
from adapter.server.counting import counting
from lmdeploy.serve.processors.multimodal import MultimodalProcessor
from lmdeploy.vl.media.image import ImageMediaIO
from lmdeploy.vl.media.video_loader import VideoLoader
from parity.conversations import data_url, video_url
from parity.videos import moving_crops, write_video
from PIL import Image
from waiting import HANG

from lmdeploy_vico.adapter.server.disconnect import while_client_waits
from lmdeploy_vico.adapter.server.items import Rules
from lmdeploy_vico.adapter.server.media import MediaParser, video_frames
from lmdeploy_vico.adapter.server.request import parse_request
from lmdeploy_vico.adapter.server.served import PixelBudget, charge
from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel
from lmdeploy_vico.vision.tiling import Tiling


def asked(messages, media_io_kwargs=None, session_len=8192):
    return parse_request(messages, media_io_kwargs, None, Rules(Tiling(1, 12), 40, session_len=session_len))


def decode(messages, media_io_kwargs=None, session_len=8192):
    """The jobs of each image and video."""
    request = asked(messages, media_io_kwargs, session_len)
    return asyncio.run(MediaParser(MultimodalProcessor)(request, media_io_kwargs)).jobs


def image(colour, **params):
    return {'type': 'image_url', 'image_url': {'url': data_url(Image.new('RGB', (9, 7), colour)), **params}}


def text(value):
    return {'type': 'text', 'text': value}


@pytest.fixture(scope='module')
def video(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp('video') / 'coffee.mp4'
    return video_url(write_video(path, moving_crops(pictures['coffee'], 40)))


def test_only_the_processor_of_a_vico_model_is_changed():
    ours = VicoVisionModel.__new__(VicoVisionModel)
    processor = MultimodalProcessor(None, None, vl_encoder=SimpleNamespace(model=ours))
    assert isinstance(processor.async_parse_multimodal_item, MediaParser)
    for encoder in (None, SimpleNamespace(model=object())):
        other = MultimodalProcessor(None, None, vl_encoder=encoder)
        assert other.async_parse_multimodal_item is MultimodalProcessor.async_parse_multimodal_item


def test_same_as_lmdeploy(video, pictures):
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
    for jobs, item in zip(decode(messages), items, strict=True):
        frames = item['data'] if item['type'] == 'video' else [item['data']]
        np.testing.assert_array_equal(pixels([job.image for job in jobs]), pixels(frames))


@pytest.mark.busy
def test_images_of_one_message_are_decoded_at_the_same_time(monkeypatch):
    together = threading.Barrier(2, timeout=HANG)
    load = ImageMediaIO.load_base64

    def meet(*args):
        together.wait()  # breaks unless two items are being decoded
        return load(*args)

    monkeypatch.setattr(ImageMediaIO, 'load_base64', meet)
    found = decode([{'role': 'user', 'content': [image('red'), image('blue')]}])
    assert [job.image.getpixel((0, 0)) for [job] in found] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.busy
def test_the_first_error_in_the_prompts_order_is_raised(monkeypatch):
    second_failed = threading.Event()

    def fail(self, media_type, data):
        if data == 'first':
            assert second_failed.wait(timeout=HANG)
            raise ValueError('first')
        second_failed.set()
        raise ValueError('second')

    monkeypatch.setattr(ImageMediaIO, 'load_base64', fail)
    content = [
        {'type': 'image_url', 'image_url': {'url': f'data:image/png;base64,{name}'}} for name in ('first', 'second')
    ]
    with pytest.raises(ValueError, match='first'):
        decode([{'role': 'user', 'content': content}])


@pytest.mark.busy
def test_threads_count_for_the_request(monkeypatch):
    def load(self, media_type, data):
        charge(100)
        return Image.new('RGB', (9, 7))

    async def run():
        with counting(budget):
            await MediaParser(MultimodalProcessor)(asked([{'role': 'user', 'content': [image('red')] * 3}]))
            return budget.taken

    budget, other = PixelBudget(10**9), PixelBudget(10**9)
    monkeypatch.setattr(ImageMediaIO, 'load_base64', load)
    with counting(other):
        assert asyncio.run(run()) == 300
    assert budget.taken == other.taken == 0


@pytest.mark.busy
@pytest.mark.parametrize('last', ['before the refusal', 'after the refusal'])
def test_what_a_refused_request_has_sent_and_decoded_is_freed_at_once(monkeypatch, last):
    """Not when Python looks for cycles next, which may be long after gigabytes have been decoded again.

    A thread that decodes cannot be interrupted: its picture goes when it has come to its end, and told the loop so.
    """
    freed, begun, ended, refused = [], threading.Event(), threading.Event(), threading.Event()

    class Message(dict):
        pass

    async def request():
        content = [
            {'type': 'image_url', 'image_url': {'url': f'data:image/png;base64,{name}'}}
            for name in ('good', 'bad', 'last')
        ]
        messages = [Message(role='user', content=content)]
        freed.append(weakref.ref(messages[0]))
        with pytest.raises(ValueError, match='bad'):
            await while_client_waits(lambda: asyncio.ensure_future(parser(asked(messages))))
        refused.set()

    def load(self, media_type, data):
        if data == 'bad':
            assert (ended if last == 'before the refusal' else begun).wait(HANG)
            raise ValueError('bad')
        if data == 'last':
            begun.set()
            assert last == 'before the refusal' or refused.wait(HANG)
        picture = Image.new('RGB', (9, 7))
        freed.append(weakref.ref(picture))
        if data == 'last':
            ended.set()
        return picture

    async def run():
        await request()
        parser._threads.shutdown()  # the threads have ended, and what they told the loop is in its queue:
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        await asyncio.sleep(0)
        assert len(freed) == 3 and not any(thing() for thing in freed)

    monkeypatch.setattr('lmdeploy_vico.adapter.server.media.AT_ONCE', 3)
    monkeypatch.setattr(ImageMediaIO, 'load_base64', load)
    parser = MediaParser(MultimodalProcessor)
    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()


def test_a_lazy_picture_many_times_passes_untouched(pictures, tmp_path):
    pictures['page'].save(tmp_path / 'page.png')
    with Image.open(tmp_path / 'page.png') as lazy:
        found = decode([{'role': 'user', 'content': [{'type': 'image', 'image': lazy, 'max_dynamic_patch': 1}] * 50}])
        assert [job.image for [job] in found] == [lazy] * 50
        assert lazy.fp.tell() < (tmp_path / 'page.png').stat().st_size  # its pixels are not read yet


def test_num_frames_of_each_video(video):
    def item(**params):
        return {'type': 'video_url', 'video_url': {'url': video, **params}}

    content = [item(), item(num_frames=3), item(num_frames=-1)]
    found = decode([{'role': 'user', 'content': content}], {'video': {'num_frames': 5}})
    assert [len(jobs) for jobs in found] == [5, 3, 40]
    [jobs] = decode([{'role': 'user', 'content': [item()]}])
    assert len(jobs) == 32
    # The 640 tokens that fit are at most 10 frames; one more shows that it is too long.
    with pytest.raises(ValueError, match=f'at least {11 * 64} visual tokens'):
        decode([{'role': 'user', 'content': [item(num_frames=-1)]}], session_len=640)


# Frame i has the colour (i, 100, 200), and its left half is dark.
FRAMES = np.stack([np.full((6, 8, 3), (i, 100, 200), dtype=np.uint8) for i in range(10)])
FRAMES[:, :, :4] //= 2


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.mark.parametrize(
    'count, expected', [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (9, [0, 1, 2, 3, 4, 5, 6, 7, 9]), (10, range(10))]
)
def test_frames_are_sampled_as_lmdeploy_samples_them(count, expected):
    np.testing.assert_array_equal(pixels(video_frames(FRAMES, 'jpeg_sequence', count)), FRAMES[list(expected)])
    assert VideoLoader.smart_nframes(10, count, -1, 0)[1] == list(expected)


@pytest.mark.parametrize('count', [None, -1, 11, 1000])
def test_all_frames(count):
    assert len(video_frames(FRAMES, 'jpeg_sequence', count)) == 10


@pytest.mark.parametrize('backend', ['torchvision', 'torchcodec'])
def test_frames_of_loaders_that_return_tensors(backend):
    frames = torch.from_numpy(FRAMES)
    found = video_frames(frames.permute(0, 3, 1, 2) if backend == 'torchcodec' else frames, backend, None)
    np.testing.assert_array_equal(pixels(found), FRAMES)


def test_errors_become_sentences(monkeypatch):
    with pytest.raises(ValueError, match='Only base64 data URLs'):
        decode([{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'data:image/png;hex,00'}}]}])
    failures = [
        (requests.HTTPError('404 for proxy 10.0.0.7', response=requests.Response()), 'status 404'),
        (requests.ConnectTimeout('10.0.0.7'), 'ConnectTimeout'),
    ]
    failures[0][0].response.status_code = 404
    raising = iter([error for error, _ in failures])

    def get(*args, **kwargs):
        raise next(raising)

    monkeypatch.setattr('lmdeploy.vl.media.connection._is_safe_url', lambda url: (True, ''))
    monkeypatch.setattr(requests.Session, 'get', get)
    for _, reason in failures:
        with pytest.raises(ValueError, match=f'An image or video could not be fetched: {reason}.$'):
            decode(
                [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'https://example.com/a'}}]}]
            )
