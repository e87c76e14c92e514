"""Videos and many images, sent to the unmodified server: right tokens, frames where and as many as asked for."""

import base64
import io
import re

import cv2
import pytest
from parity.conversations import data_url, video_url
from parity.videos import moving_crops, read_video, write_video
from PIL import Image
from serving.client import PeakMemory, chat, generate
from serving.configurations import LIMITED, MEMORY, SESSION_LEN

FRAMES = 64

pytestmark = LIMITED


@pytest.fixture(scope='module')
def videos(pictures, tmp_path_factory):
    """Files of 80 frames each."""
    folder = tmp_path_factory.mktemp('videos')
    return {
        name: write_video(folder / f'{name}.mp4', moving_crops(pictures[name], 80)) for name in ('coffee', 'chelsea')
    }


def video(file, count, **params):
    return {'type': 'video_url', 'video_url': {'url': file, 'frames': read_video(file, count), **params}}


def image(picture, **params):
    return {'type': 'image_url', 'image_url': {'url': picture, **params}}


def text(value):
    return {'type': 'text', 'text': value}


def user(*content):
    return [{'role': 'user', 'content': list(content)}]


def test_a_video_of_64_frames(client, judge, videos):
    messages = user(video(videos['coffee'], FRAMES), text('What happens?'))
    answer = client.chat(messages, media_io_kwargs={'video': {'num_frames': FRAMES}})
    judge().check(messages, answer)


def test_32_frames_unless_asked(client, judge, videos):
    messages = user(text('Watch: '), video(videos['chelsea'], 32))
    judge().check(messages, client.chat(messages))


def test_videos_and_images_in_several_turns(client, judge, videos, pictures):
    messages = [
        {'role': 'system', 'content': 'You are terse.'},
        *user(text('A cup: '), video(videos['coffee'], 5, num_frames=5), text(' And this?'), image(pictures['page'])),
        {'role': 'assistant', 'content': 'A page.'},
        *user(image(pictures['rocket']), video(videos['chelsea'], 3, num_frames=3), video(videos['coffee'], 2)),
    ]
    messages[-1]['content'][-1]['video_url']['num_frames'] = 2
    judge().check(messages, client.chat(messages, media_io_kwargs={'video': {'num_frames': 7}}))


def test_a_sequence_of_jpeg_frames(client, judge, pictures):
    frames = [Image.fromarray(frame) for frame in moving_crops(pictures['coffee'], 9, step=(30, 20))]
    encoded = [data_url(frame, 'JPEG').partition(',')[2] for frame in frames]
    url = 'data:video/jpeg;base64,' + ','.join(encoded)
    shown = [Image.open(io.BytesIO(base64.b64decode(encoded[index]))).convert('RGB') for index in (0, 4, 8)]
    messages = user({'type': 'video_url', 'video_url': {'url': url, 'num_frames': 3, 'frames': shown}}, text('What?'))
    judge().check(messages, client.chat(messages))


@pytest.mark.parametrize('compression', ['all', 'none', 0.5])
def test_frames_of_a_video_with_its_own_compression_are_routed_together(client, judge, videos, pictures, compression):
    messages = user(image(pictures['page']), video(videos['coffee'], 6, num_frames=6, compression=compression))
    judge().check(messages, client.chat(messages))


def test_50_images(client, judge, pictures):
    content = []
    for index, crop in enumerate(crops(pictures, 50)):
        content += [text(f'Picture {index + 1}: '), image(crop)]
    content[1], content[35] = image(pictures['coffee']), image(pictures['rocket'].resize((300, 140)))  # 7 and 3 tiles
    messages = user(*content, text('Which is the odd one out?'))
    judge().check(messages, client.chat(messages))


def crops(pictures, count, width=110):
    """Different pieces of the pictures, 100 pixels high: one tile if 110 wide, seven if 150."""
    names = list(pictures)
    corners = [(7 * index % 60, 5 * index % 40) for index in range(count)]
    return [
        pictures[names[index % len(names)]].crop((left, top, left + width, top + 100))
        for index, (left, top) in enumerate(corners)
    ]


def test_huge_frames(client, judge, pictures, tmp_path):
    """In full size the frames would take three times the memory."""
    size, file = (3840, 2160), tmp_path / '4k.mp4'
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*'mp4v'), 8, size)
    for crop in moving_crops(pictures['coffee'], 12):
        writer.write(cv2.resize(crop, size, interpolation=cv2.INTER_NEAREST)[..., ::-1])
    writer.release()
    memory = PeakMemory(client)
    messages = user(video(file, 12), text('What happens?'))
    judge().check(messages, client.chat(messages))
    assert memory.growth() < 2 * MEMORY


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def long_video(pictures, tmp_path_factory):
    """300 frames, which even at 64 tokens each are too many."""
    path = tmp_path_factory.mktemp('long') / 'long.mp4'
    return video_url(write_video(path, moving_crops(pictures['coffee'], 300, step=(1, 1))))


@pytest.mark.parametrize(
    'compression, params, least', [('none', {'num_frames': 64}, 64 * 256), ('auto', {'num_frames': -1}, 257 * 64)]
)
def test_a_video_that_cannot_fit_is_refused_before_it_is_encoded(client, long_video, compression, params, least):
    before = client.encoded_tiles()
    item = {'type': 'video_url', 'video_url': {'url': long_video, **params}}
    status, body = chat(client, item, mm_processor_kwargs={'image': {'compression': compression}})
    assert status == 400
    assert f'at least {least} visual tokens, more than the model context length ({SESSION_LEN})' in body['message']
    assert client.encoded_tiles() == before


def test_50_images_that_cannot_fit_are_refused_before_they_are_encoded(client, pictures):
    before = client.encoded_tiles()
    status, body = chat(client, *[image(data_url(crop)) for crop in crops(pictures, 50, width=150)])
    assert status == 400
    least = 50 * 7 * 64
    assert f'at least {least} visual tokens, more than the model context length ({SESSION_LEN})' in body['message']
    assert client.encoded_tiles() == before


def refused_after_routing(client, items, least):
    status, body = chat(client, *items, text='word ' * 4000, mm_processor_kwargs={'image': {'compression': 'none'}})
    assert status == 400
    pattern = r'Input length \((\d+)\) must be smaller than the model context length \((\d+)\)'
    length, limit = map(int, re.search(pattern, body['message']).groups())
    assert limit == SESSION_LEN <= length and least < length


def test_a_video_that_does_not_fit_after_routing(client, long_video):
    item = {'type': 'video_url', 'video_url': {'url': long_video, 'num_frames': 50}}
    refused_after_routing(client, [item], 50 * 256)


def test_50_images_that_do_not_fit_after_routing(client, pictures):
    refused_after_routing(client, [image(data_url(crop)) for crop in crops(pictures, 50)], 50 * 256)


def bad(url='data:video/mp4;base64,AAAA', **params):
    return {'type': 'video_url', 'video_url': {'url': url, **params}}


JPEG = data_url(Image.new('RGB', (64, 48), (200, 30, 30)), 'JPEG').replace('image', 'video', 1)
BAD_VIDEOS = {
    'not a video': (bad(), 'The data is not a video that can be read: MP4, MOV'),
    'zero bytes': (bad('data:video/mp4;base64,'), 'Invalid data URL'),
    'not base64': (bad('data:video/mp4;base64,€€€'), 'base64 of a data URL is damaged'),
    'a file of the server': (bad('file:///nothing/here.mp4'), 'must be an http, https or data URL'),
    'a number': (bad(5), 'A video item must have a string "url"'),
    'cut in the middle': (bad(JPEG[: len(JPEG) // 2]), 'A frame of the video cannot be read'),
    'no frames': (bad(JPEG, num_frames=0), 'must be a positive integer, or -1 for all frames, not 0'),
    'extra data': (bad(JPEG, data='AAAA'), 'either "url" or "data", not both'),
    'extra type': (bad(JPEG, type='image'), 'either "url" or "data", not both'),
    'type text': (bad(JPEG, type='text'), 'no "type" of its own'),
    'unknown key': (
        bad(JPEG, detail='low'),
        "'detail' is not a key of a video item; url, num_frames, compression, uuid are",
    ),
    'unknown compression': (bad(JPEG, compression='most'), 'video_url["compression"] must be "auto"'),
    'too many frames': (bad(JPEG + ',AAAA' * 300), 'The video has 301 frames and at least 19264 visual tokens'),
    'an image called video': (image(JPEG, type='video'), 'An image item must have either "url" or "data"'),
}


@pytest.mark.parametrize('item, message', BAD_VIDEOS.values(), ids=BAD_VIDEOS.keys())
def test_bad_video_items(client, item, message):
    status, body = chat(client, item)
    assert status == 400, body
    assert message in body['message']


@pytest.mark.parametrize(
    'options, message',
    [
        ({'media_io_kwargs': {'video': {'num_frames': '64'}}}, 'media_io_kwargs["video"]["num_frames"] must be'),
        ({'media_io_kwargs': {'video': {'backend': 'x'}}}, 'has the keys "num_frames" and "fps", not \'backend\''),
        ({'mm_processor_kwargs': {'video': {'compression': 'all'}}}, 'mm_processor_kwargs has no "video"'),
    ],
)
def test_bad_options_of_a_request(client, options, message):
    status, body = chat(client, bad(JPEG), **options)
    assert status == 400, body
    assert message in body['message']


def test_a_sequence_of_huge_frames(client):
    frame = data_url(Image.new('L', (3840, 2160)), 'JPEG').partition(',')[2]
    memory = PeakMemory(client)
    status, body = chat(client, bad('data:video/jpeg;base64,' + ','.join([frame] * 100)))
    assert status == 400, body
    assert re.search(rf'takes at least \d+ bytes of memory, more than the limit of {MEMORY} ', body['message'])
    assert memory.growth() < 3 * MEMORY


def test_videos_in_raw_prompts(client):
    status, body = generate(client, prompt='Look: ', image_data={'url': JPEG, 'type': 'video'})
    assert status == 400
    assert 'An image item must have either "url" or "data"' in body['message']


def test_still_right_afterwards(client, prompts, judge):
    judge().check(prompts['one photograph'], client.chat(prompts['one photograph']))
