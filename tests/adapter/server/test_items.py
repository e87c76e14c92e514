"""Everything a client controls about its images."""

import numpy as np
import pytest
from PIL import Image

from lmdeploy_vico.adapter.server.items import (
    FRAME,
    ImageItem,
    Rules,
    TextItem,
    VideoItem,
    parse_item,
    parse_media_io_kwargs,
)
from lmdeploy_vico.vision.tiling import Grid, Tiling

PICTURE = Image.new('RGB', (8, 8))
TILING = Tiling(1, 12)
URL = 'https://example.com/cat.mp4'


def parsed(item, role='user', max_tiles=40, media_io_kwargs=None, session_len=6400):
    video_options = parse_media_io_kwargs(media_io_kwargs)
    return parse_item(item, 3, role, video_options, Rules(TILING, max_tiles, session_len=session_len))


def limited(item, limit):
    return parse_item(item, 3, 'user', {}, Rules(TILING, 40), limit)


def image(**params):
    return {'type': 'image_url', 'image_url': {'url': 'x'} | params}


def video(url=URL, **params):
    return {'type': 'video_url', 'video_url': {'url': url, **params}}


# --- items -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('item', [5, 'text', None, ['text']])
def test_items_that_are_none(item):
    with pytest.raises(ValueError, match='A content item must be an object with a "type", not '):
        parsed(item)


@pytest.mark.parametrize('kind', ['audio', 'nonsense', 'image_pil', 3, ['video']])
def test_other_modalities(kind):
    with pytest.raises(ValueError, match='are not supported; text, image_url and video_url are'):
        parsed({'type': kind})


@pytest.mark.parametrize('item', [image(), video()])
def test_media_in_other_roles(item):
    with pytest.raises(ValueError, match="Images and videos are accepted .* not in 'assistant' messages"):
        parsed(item, role='assistant')
    assert parsed({'type': 'text', 'text': 'x'}, role='assistant') == TextItem('x')


@pytest.mark.parametrize(
    'item, name',
    [
        (image(data=PICTURE), 'An image'),
        (video(data=PICTURE), 'A video'),
        ({'type': 'image', 'image': 'x', 'data': 'y'}, 'An image'),
        ({'type': 'image', 'image': 'x', 'url': 'y'}, 'An image'),
        ({'type': 'image_url', 'url': 'y'}, 'An image'),
        (image(type='video'), 'An image'),
        (image(type='text', text=[5, 6]), 'An image'),
        (video(type='image_url'), 'A video'),
    ],
)
def test_two_sources_or_two_types(item, name):
    with pytest.raises(ValueError, match=f'{name} item must have either "url" or "data", not both, and no "type" of'):
        parsed(item)


# --- images ----------------------------------------------------------------------------------------------------------


def test_defaults():
    item = image()
    assert parsed(item) == ImageItem(3, item['image_url']['url'], TILING)


def test_the_request_can_set_the_tile_limit():
    assert limited(image(), 3).tiling == Tiling(1, 3)
    for own in ({'detail': 'auto'}, {'detail': 'low'}, {'max_dynamic_patch': 6}):
        assert limited(image(**own), 3).tiling == parsed(image(**own)).tiling


@pytest.mark.parametrize(
    'params, max_tiles',
    [
        ({'detail': 'low'}, 6),
        ({'detail': 'medium'}, 12),
        ({'detail': 'high'}, 24),
        ({'detail': 'auto'}, 12),
        ({'detail': 'original'}, 40),
        ({'max_dynamic_patch': 3, 'detail': 'high'}, 3),
        ({'max_dynamic_patch': 40}, 40),
    ],
)
def test_tile_limit(params, max_tiles):
    for item in (image(**params), {'type': 'image', 'image': PICTURE, **params}):
        found = parsed(item)
        assert found.tiling == Tiling(1, max_tiles) and found.most_tiles == max_tiles + 1


@pytest.mark.parametrize('value', [0, -1, 41, 10**6, 2.0, '4', True, [1]])
def test_bad_tile_limits(value):
    with pytest.raises(ValueError, match='max_dynamic_patch must be an integer from 1 to 40, not '):
        parsed(image(max_dynamic_patch=value))


@pytest.mark.parametrize('value', ['bogus', 7, [], True])
def test_bad_detail(value):
    with pytest.raises(ValueError, match='detail must be "auto", "low", "medium", "high" or "original", not '):
        parsed(image(detail=value))


def test_unknown_keys_of_an_image_item():
    with pytest.raises(ValueError, match="'compresion' is not a key of an image item"):
        parsed(image(compresion='all'))


@pytest.mark.parametrize('value', ['half', 2, True, {}])
def test_bad_compression_of_an_image(value):
    with pytest.raises(ValueError, match=r'image_url\["compression"\] must be "auto"'):
        parsed(image(compression=value))


@pytest.mark.parametrize('detail', ['high', 'original'])
def test_detail_cannot_exceed_the_servers_limit(detail):
    assert parsed(image(detail=detail), max_tiles=8).tiling == Tiling(1, 8)


def test_the_grid_is_that_of_the_decoded_picture():
    picture = Image.new('RGB', (896, 448))
    [job] = parsed(image(compression='all')).jobs(picture, 0)
    assert (job.image, job.grid, job.compression, job.routed_with) == (picture, Grid(2, 1, True), 'all', None)
    [job] = parsed(image(max_dynamic_patch=1)).jobs(picture, 0)
    assert (job.grid, job.compression) == (Grid(1, 1, False), None)


@pytest.mark.parametrize('source', [5, None, ['a'], {}, ''])
def test_images_without_a_url(source):
    for item in (image(url=source), {'type': 'image', 'image': source}):
        with pytest.raises(ValueError, match='An image item must have a string "url"'):
            parsed(item)


@pytest.mark.parametrize('decoded', ['iVBOR', None, np.zeros((4, 4, 3))])
def test_what_is_no_picture(decoded):
    with pytest.raises(ValueError, match='An image item must have either "url" or "data"'):
        parsed(image()).jobs(decoded, 0)


# --- videos ----------------------------------------------------------------------------------------------------------


def options(params=None, url=URL, session_len=6400, **video_kwargs):
    found = parsed(video(url, **(params or {})), media_io_kwargs={'video': video_kwargs}, session_len=session_len)
    return found.options, found.num_frames


def sequence(count):
    return 'data:video/jpeg;base64,' + ','.join(['AAAA'] * count)


@pytest.mark.parametrize('key', ['detail', 'max_dynamic_patch', 'fps', 'routed_with'])
def test_unknown_keys_of_a_video_item(key):
    with pytest.raises(
        ValueError, match=f"'{key}' is not a key of a video item; url, num_frames, compression, uuid are"
    ):
        parsed(video(**{key: 1}))


def test_bad_compression_of_a_video():
    with pytest.raises(ValueError, match=r'video_url\["compression"\] must be "auto"'):
        parsed(video(compression='most'))


def test_a_frame_is_an_image_of_one_tile():
    frames = [Image.new('RGB', (80, 6), (i, 100, 200)) for i in range(3)]
    jobs = parsed(video()).jobs(frames, 5)
    assert [job.image for job in jobs] == frames
    assert all((job.grid, job.compression, job.routed_with) == (FRAME, None, None) for job in jobs)
    assert Tiling(1, 1).grid((80, 6)) == FRAME
    jobs = parsed(video(compression=0.5)).jobs(frames, 5)
    assert all((job.compression, job.routed_with) == (0.5, 5) for job in jobs)


def test_the_item_comes_before_the_request():
    assert options() == ({}, None)
    assert options(num_frames=64) == ({'num_frames': 64}, 64)
    assert options({'num_frames': 8}, num_frames=64) == ({'num_frames': 8}, 8)
    assert options({'num_frames': None}, num_frames=64, fps=0.5) == ({'num_frames': 64, 'fps': 0.5}, 64)
    found = parsed({'type': 'video', 'video': URL, 'num_frames': 3}, session_len=None)
    assert isinstance(found, VideoItem) and (found.options, found.num_frames) == ({'num_frames': 3}, 3)


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


def test_bad_options_for_videos():
    with pytest.raises(ValueError, match='has the keys "num_frames" and "fps", not \'image_io\''):
        options(image_io=3)


# --- ids -------------------------------------------------------------------------------------------------------------


KEEPS = Rules(TILING, 40, media_ids=True)


@pytest.mark.parametrize('make', [image, video])
def test_an_id_beside_a_url_or_in_its_place(make):
    def uuid(item, rules=KEEPS):
        found = parse_item(item, 0, 'user', {}, rules)
        return found.source, found.uuid

    kind = make()['type']
    assert uuid(make(url='x', uuid='a')) == ('x', 'a')
    assert uuid({**make(url='x'), 'uuid': 'a'}) == ('x', 'a')  # where vLLM has it
    for item in ({**make(url=None), 'uuid': 'a'}, {'type': kind, 'uuid': 'a'}, {'type': kind, kind: None, 'uuid': 'a'}):
        assert uuid(item) == (None, 'a')
    assert uuid(make(url='x', uuid='a'), Rules(TILING, 40)) == ('x', 'a')
    with pytest.raises(ValueError, match='keeps no images and videos by their "uuid"'):
        uuid({**make(url=None), 'uuid': 'a'}, Rules(TILING, 40))


@pytest.mark.parametrize('value', ['', 'a' * 257, 5, ['a'], True])
def test_bad_ids(value):
    with pytest.raises(ValueError, match='uuid must be a string of 1 to 256 characters, not '):
        parse_item(image(uuid=value), 0, 'user', {}, KEEPS)


def test_an_id_of_a_decoded_picture():
    with pytest.raises(ValueError, match='"uuid" names the bytes of a url'):
        parsed({'type': 'image', 'image': PICTURE, 'uuid': 'a'})


@pytest.mark.parametrize('url', [5, None, ['a'], {}, np.zeros((4, 6, 8, 3)), ''])
def test_urls_that_are_none(url):
    with pytest.raises(ValueError, match='must have a string "url"'):
        options(url=url)


def test_a_sequence_of_frames_that_cannot_fit():
    assert options(url=sequence(100), session_len=6400) == ({}, None)
    message = r'101 frames and at least 6464 visual tokens, more than the model context length \(6400\)'
    with pytest.raises(ValueError, match=message):
        options(url=sequence(101), session_len=6400)


@pytest.mark.parametrize(
    'item, most',
    [
        (video(), 32),  # LMDeploy's default
        (video(num_frames=8), 8),
        (video(num_frames=-1), 101),  # what is decoded at most
        (video(sequence(3)), 3),  # which brings its own number
        (video(sequence(3), num_frames=2), 2),
        (video(sequence(3), num_frames=9), 3),
    ],
)
def test_most_frames(item, most):
    assert parsed(item).most_tiles == most
