"""Videos and many images, sent to the unmodified server: right tokens, frames where and as many as asked for."""

import base64
import io

import pytest
from parity.conversations import data_url
from parity.videos import moving_crops, read_video, write_video
from PIL import Image
from serving.conftest import Client

FRAMES = 64


@pytest.fixture(scope='module')
def client(serve, make_checkpoint):
    return Client(serve(make_checkpoint()))


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
    names = list(pictures)
    content = []
    for index in range(50):
        picture = pictures[names[index % len(names)]]
        left, top = 7 * index % 60, 5 * index % 40
        crop = picture.crop((left, top, left + 110, top + 100)) if index % 17 else picture.resize((300, 140))
        content += [text(f'Picture {index + 1}: '), image(crop)]
    messages = user(*content, text('Which is the odd one out?'))
    judge().check(messages, client.chat(messages))
