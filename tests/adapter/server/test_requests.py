"""Everything a client controls about its images."""

import pytest
from PIL import Image

from lmdeploy_vico.adapter.server.requests import media_jobs, prompt_compression
from lmdeploy_vico.vision.tiling import Grid, Tiling

PICTURE = Image.new('RGB', (400, 1))  # so wide that its grid is one row of as many tiles as are allowed
TILING = Tiling(1, 12)


def jobs(item, role='user', max_tiles=40):
    return media_jobs([{'role': role, 'content': [{'type': 'text', 'text': 'x'}, item]}], TILING, max_tiles)[0]


def row(tiles=12):
    return Grid(tiles, 1, thumbnail=True)


def image(**params):
    return {'type': 'image', 'data': PICTURE, **params}


def test_order_and_defaults():
    messages = [
        {'role': 'user', 'content': [image(), {'type': 'text', 'text': 'x'}, image(compression='all')]},
        {'role': 'assistant', 'content': 'y'},
        {'role': 'user', 'content': [image(detail='low')]},
    ]
    found = media_jobs(messages, TILING, 40)[0]
    assert [(job.grid, job.compression) for job in found] == [(row(), None), (row(), 'all'), (row(6), None)]


@pytest.mark.parametrize(
    'params, max_tiles',
    [
        ({'detail': 'low'}, 6),
        ({'detail': 'medium'}, 12),
        ({'detail': 'high'}, 24),
        ({'detail': 'auto'}, 12),
        ({'max_dynamic_patch': 3, 'detail': 'high'}, 3),
        ({'max_dynamic_patch': 40}, 40),
    ],
)
def test_tile_limit(params, max_tiles):
    assert jobs(image(**params))[0].grid == row(max_tiles)


@pytest.mark.parametrize('value', [0, -1, 41, 10**6, 2.0, '4', True, [1]])
def test_bad_tile_limits(value):
    with pytest.raises(ValueError, match='max_dynamic_patch must be an integer from 1 to 40, not '):
        jobs(image(max_dynamic_patch=value))


@pytest.mark.parametrize('value', ['bogus', 7, [], True])
def test_bad_detail(value):
    with pytest.raises(ValueError, match='detail must be "auto", "low", "medium" or "high", not '):
        jobs(image(detail=value))


def test_unknown_keys_of_an_image_item():
    with pytest.raises(ValueError, match="'compresion' is not a key of an image item"):
        jobs(image(compresion='all'))


@pytest.mark.parametrize('value', ['half', 2, True, {}])
def test_bad_compression(value):
    with pytest.raises(ValueError, match=r'image_url\["compression"\] must be "auto"'):
        jobs(image(compression=value))


def test_detail_cannot_exceed_the_servers_limit():
    assert jobs(image(detail='high'), max_tiles=8)[0].grid == row(8)


def test_data_that_was_not_decoded():
    with pytest.raises(ValueError, match='either "url" or "data", not both'):
        jobs(image(data='iVBORw0KGgo='))


@pytest.mark.parametrize('kind', ['audio', 'nonsense', None, 3])
def test_other_modalities(kind):
    with pytest.raises(ValueError, match='are not supported; text, image_url and video_url are'):
        jobs(image(type=kind))


def test_images_in_other_roles():
    with pytest.raises(ValueError, match="not in 'assistant' messages"):
        jobs({'type': 'image_url', 'image_url': {'url': 'x'}}, role='assistant')


def test_request_compression():
    assert prompt_compression(None, 'auto') == 'auto'
    assert prompt_compression({}, 0.5) == 0.5
    assert prompt_compression({'image': None, 'video': {}}, 'all') == 'all'
    assert prompt_compression({'image': {'compression': None}}, 'all') == 'all'
    assert prompt_compression({'image': {'compression': 0.25}}, 'auto') == 0.25


def test_compression_in_the_wrong_place():
    with pytest.raises(ValueError, match='"compression" belongs under "image"'):
        prompt_compression({'compression': 'all'}, 'auto')


def test_bad_request_compression():
    with pytest.raises(ValueError, match=r'mm_processor_kwargs\["image"\] must be an object'):
        prompt_compression({'image': 'none'}, 'auto')
    with pytest.raises(ValueError, match=r'mm_processor_kwargs\["image"\]\["compression"\] must be "auto"'):
        prompt_compression({'image': {'compression': 'most'}}, 'auto')
    with pytest.raises(ValueError, match='has the key "compression" only, not \'compresion\''):
        prompt_compression({'image': {'compresion': 'all'}}, 'auto')
