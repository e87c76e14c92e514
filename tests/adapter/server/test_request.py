"""A request is parsed once: what it asks for, how many tiles it will have, and whether they fit."""

import pytest
from PIL import Image

from lmdeploy_vico.adapter.server.items import ImageItem, Rules, TextItem, VideoItem
from lmdeploy_vico.adapter.server.request import parse_request
from lmdeploy_vico.vision.tiling import Tiling

TEXT = {'type': 'text', 'text': 'x'}
IMAGE = {'type': 'image_url', 'image_url': {'url': 'x'}}
VIDEO = {'type': 'video_url', 'video_url': {'url': 'x', 'num_frames': 8}}


def user(*content):
    return {'role': 'user', 'content': list(content)}


def parsed(*messages, media_io_kwargs=None, mm_processor_kwargs=None, compression='auto', session_len=6400):
    rules = Rules(Tiling(1, 12), 40, compression, session_len)
    return parse_request(messages, media_io_kwargs, mm_processor_kwargs, rules)


def compression(mm_processor_kwargs, default='auto'):
    return parsed(user(IMAGE), mm_processor_kwargs=mm_processor_kwargs, compression=default).compression


def test_conversation():
    messages = [
        {'role': 'system', 'content': 'a'},
        user(IMAGE, TEXT, VIDEO),
        {'role': 'assistant', 'content': None, 'tool_calls': [1]},
        {'role': 'assistant', 'tool_calls': [2]},
        {'role': 'assistant', 'content': [TEXT, TEXT]},
        user(),
        {'role': 'tool', 'content': [IMAGE], 'name': 'me'},
    ]
    request = parsed(*messages)
    assert [message.sent for message in request.messages] == messages
    assert [message.content for message in request.messages if not message.items] == ['a', '', '', ()]
    assert [type(item) for item in request.items] == [ImageItem, TextItem, VideoItem, TextItem, TextItem, ImageItem]
    assert [(item.sent, item.message) for item in request.media] == [(IMAGE, 1), (VIDEO, 1), (IMAGE, 6)]


@pytest.mark.parametrize('content', [5, {'type': 'text'}, True])
def test_content_that_is_none(content):
    with pytest.raises(ValueError, match='content of a message must be a string or a list of items, not '):
        parsed({'role': 'user', 'content': content}, user(IMAGE))


@pytest.mark.parametrize('value', [5, 'x', [1]])
def test_bad_media_io_kwargs(value):
    with pytest.raises(ValueError, match='media_io_kwargs must be an object, not '):
        parsed(user(VIDEO), media_io_kwargs=value)


def test_compression_of_the_request():
    assert compression(None) == 'auto'
    assert compression({}, default=0.5) == 0.5
    assert compression({'image': None, 'video': {}}, default='all') == 'all'
    assert compression({'image': {'compression': None}}, default='all') == 'all'
    assert compression({'image': {'compression': 0.25}}) == 0.25


@pytest.mark.parametrize(
    'value, message',
    [
        ({'compression': 'all'}, '"compression" belongs under "image"'),
        ({'video': {'compression': 'all'}}, 'mm_processor_kwargs has no "video"'),
        ({'image': 'none'}, r'mm_processor_kwargs\["image"\] must be an object'),
        ({'image': {'compression': 'most'}}, r'mm_processor_kwargs\["image"\]\["compression"\] must be "auto"'),
        ({'image': {'compresion': 'all'}}, 'has the key "compression" only, not \'compresion\''),
    ],
)
def test_bad_compression_of_the_request(value, message):
    with pytest.raises(ValueError, match=message):
        compression(value)


# --- how much it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'content, most',
    [
        ([IMAGE, TEXT, IMAGE], 26),
        ([VIDEO, IMAGE, {'type': 'image', 'image': 'x', 'max_dynamic_patch': 3}], 8 + 13 + 4),
        ([TEXT], 0),
        ([], 0),
        ([IMAGE] * 50, 101),  # one more than could be answered
    ],
)
def test_estimate(content, most):
    assert parsed(user(*content)).most_tiles() == most


def test_estimate_without_a_session_length():
    video = {'type': 'video', 'video': 'x', 'num_frames': 500}
    assert parsed(user(video, IMAGE), session_len=None).most_tiles() == 513


def test_more_images_than_fit_whatever_they_show():
    assert parsed(user(*[IMAGE] * 99)).most_tiles()
    with pytest.raises(ValueError, match=r'at least 6400 visual tokens, more than the model context length \(6400\)'):
        parsed(user(*[IMAGE] * 100)).most_tiles()


def decoded(request, size):
    return request.decoded([item.jobs(Image.new('RGB', size), 0) for item in request.media])


def test_decoded_images_in_order():
    request = parsed(user(IMAGE, VIDEO, IMAGE))
    pictures = [Image.new('RGB', (8, 8)) for _ in range(4)]
    first, video, last = request.media
    jobs = [first.jobs(pictures[0], 0), video.jobs(pictures[1:3], 1), last.jobs(pictures[3], 2)]
    found = request.decoded(jobs)
    assert [job.image for job in found.images] == pictures and [len(of_item) for of_item in found.jobs] == [1, 2, 1]
    assert (found.messages, found.compression) == (request.messages, request.compression)
    assert not request.images


@pytest.mark.parametrize('value, least', [('auto', 64), ('all', 64), ('none', 256), (0, 256), (0.5, 64)])
def test_decoded_images_that_cannot_fit(value, least):
    def tiles(session_len):
        request = parsed(user(IMAGE, IMAGE), mm_processor_kwargs=asked, session_len=session_len)
        return len(decoded(request, (896, 448)).images)

    asked = {'image': {'compression': value}}
    assert tiles(6 * least + 1) == 2  # of three tiles each
    with pytest.raises(ValueError, match=f'at least {6 * least} visual tokens, more than the model context length'):
        tiles(6 * least)


def test_an_images_own_compression_counts():
    own = {'type': 'image_url', 'image_url': {'url': 'x', 'compression': 'none'}}
    with pytest.raises(ValueError, match=f'at least {3 * 256 + 3 * 64} visual tokens'):
        decoded(parsed(user(own, IMAGE), session_len=900), (896, 448))
