"""Everything a client controls about its videos."""

import numpy as np
import pytest
from lmdeploy.model import BaseChatTemplate
from PIL import Image

from lmdeploy_vico.adapter.server.requests import media_jobs, prompt_compression, video_options
from lmdeploy_vico.adapter.server.vision_model import VicoVisionModel
from lmdeploy_vico.options import Options
from lmdeploy_vico.vision.tiling import Tiling

URL = 'https://example.com/cat.mp4'
FRAMES = [Image.new('RGB', (80, 6), (i, 100, 200)) for i in range(10)]


def video(frames=FRAMES, **params):
    return {'type': 'video', 'data': frames, 'video_metadata': {'total_num_frames': 100}, **params}


def jobs(*items, role='user'):
    return media_jobs([{'role': role, 'content': [{'type': 'text', 'text': 'x'}, *items]}], Tiling(1, 12), 40)


def indices(found):
    return [job.image.getpixel((0, 0))[0] for job in found]


def options(params=None, url=URL, session_len=6400, **video_kwargs):
    item = {'type': 'video_url', 'video_url': {'url': url, **(params or {})}}
    return video_options(item, {'video': video_kwargs}, session_len)


# --- decoded frames --------------------------------------------------------------------------------------------------


def test_a_frame_is_an_image_of_one_tile():
    found, videos = jobs(video())
    assert videos == [10] and indices(found) == list(range(10))
    assert all((job.grid.tiles, job.compression, job.routed_with) == (1, None, None) for job in found)


def test_images_and_videos_in_order():
    picture = {'type': 'image', 'data': Image.new('RGB', (8, 8), (77, 0, 0))}
    found, videos = jobs(
        video(FRAMES[:2], num_frames=2), picture, video(compression='all'), video(FRAMES[:1], compression=0.5)
    )
    assert videos == [2, 10, 1]
    assert indices(found) == [0, 1, 77, *range(10), 0]
    assert [job.routed_with for job in found] == [None] * 3 + [1] * 10 + [2]
    assert [job.compression for job in found] == [None] * 3 + ['all'] * 10 + [0.5]


@pytest.mark.parametrize('data', ['iVBOR', [[1]], [], None, Image.new('RGB', (8, 8))])
def test_data_that_was_not_decoded(data):
    with pytest.raises(ValueError, match='A video item must have either "url" or "data", not both'):
        jobs(video(data))


@pytest.mark.parametrize('key', ['detail', 'max_dynamic_patch', 'fps', 'routed_with'])
def test_unknown_keys_of_a_video_item(key):
    with pytest.raises(ValueError, match=f"'{key}' is not a key of a video item; url, num_frames, compression are"):
        jobs(video(**{key: 1}))


def test_bad_compression():
    with pytest.raises(ValueError, match=r'video_url\["compression"\] must be "auto"'):
        jobs(video(compression='most'))


def test_videos_in_other_roles():
    with pytest.raises(ValueError, match="videos are accepted in user and tool messages, not in 'assistant' messages"):
        jobs({'type': 'video_url', 'video_url': {'url': URL}}, role='assistant')


def test_compression_of_the_request_has_no_section_for_videos():
    with pytest.raises(ValueError, match='mm_processor_kwargs has no "video"'):
        prompt_compression({'video': {'compression': 'all'}}, 'auto')


def test_videos_in_raw_prompts():
    model = VicoVisionModel.__new__(VicoVisionModel)
    model.options, model._tiling = Options(), Tiling(1, 12)
    with pytest.raises(ValueError, match='Videos are accepted in chat messages only, not in raw prompts'):
        model.get_input_prompt([{'role': 'user', 'content': [video()]}], BaseChatTemplate())


# --- before decoding -------------------------------------------------------------------------------------------------


def test_the_item_comes_before_the_request():
    assert options() == ({}, None)
    assert options(num_frames=64) == ({'num_frames': 64}, 64)
    assert options({'num_frames': 8}, num_frames=64) == ({'num_frames': 8}, 8)
    assert options({'num_frames': None}, num_frames=64, fps=0.5) == ({'num_frames': 64, 'fps': 0.5}, 64)
    assert video_options({'type': 'video', 'video': URL, 'num_frames': 3}, {}, None) == ({'num_frames': 3}, 3)


@pytest.mark.parametrize('count', [-1, 101, 102, 10**9])
def test_no_more_frames_are_decoded_than_can_fit(count):
    assert options(num_frames=count, session_len=6400) == ({'num_frames': 101}, count)


@pytest.mark.parametrize('value', [0, -2, 2.0, '4', True, [1]])
def test_bad_num_frames(value):
    message = 'must be a positive integer, or -1 for all frames, not '
    with pytest.raises(ValueError, match=r'media_io_kwargs\["video"\]\["num_frames"\] ' + message):
        options(num_frames=value)
    with pytest.raises(ValueError, match=r'video_url\["num_frames"\] ' + message):
        options({'num_frames': value})


@pytest.mark.parametrize('value', [0, -1, '2', True, float('nan'), float('inf')])
def test_bad_fps(value):
    with pytest.raises(ValueError, match=r'\["fps"\] must be a number above 0, not '):
        options(fps=value)


def test_bad_media_io_kwargs():
    with pytest.raises(ValueError, match='has the keys "num_frames" and "fps", not \'image_io\''):
        options(image_io=3)
    with pytest.raises(ValueError, match=r'media_io_kwargs\["video"\] must be an object'):
        video_options({'type': 'video', 'video': URL}, {'video': 3}, None)


@pytest.mark.parametrize('url', [5, None, ['a'], {}, np.zeros((4, 6, 8, 3))])
def test_urls_that_are_none(url):
    with pytest.raises(ValueError, match='must have a string "url"'):
        options(url=url)


def test_a_sequence_of_frames_that_cannot_fit():
    def sequence(count):
        return 'data:video/jpeg;base64,' + ','.join(['AAAA'] * count)

    assert options(url=sequence(100), session_len=6400) == ({}, None)
    message = r'101 frames and at least 6464 visual tokens, more than the model context length \(6400\)'
    with pytest.raises(ValueError, match=message):
        options(url=sequence(101), session_len=6400)
