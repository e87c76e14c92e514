"""How many tiles a place is held for, before anything is decoded or checked."""

import pytest

from lmdeploy_vico.adapter.admission import estimate_tiles

IMAGE = {'type': 'image_url', 'image_url': {'url': 'x'}}


def video(**params):
    return {'type': 'video_url', 'video_url': {'url': 'x', **params}}


@pytest.mark.parametrize(
    'content, tiles',
    [
        ([IMAGE, {'type': 'text', 'text': 'x'}, IMAGE], 26),
        ([video()], 64),
        ([video(num_frames=8), IMAGE, video(num_frames=3)], 8 + 13 + 3),
        ([video(num_frames='x'), {'type': 'video', 'video': 'x', 'num_frames': 5}], 64 + 5),
        (['x', None, {'type': ['video']}, {'type': 'video_url', 'video_url': None}], 64),
        ('text', 0),
        (None, 0),
    ],
)
def test_estimate(content, tiles):
    assert estimate_tiles([{'role': 'user', 'content': content}, 'x'], {'video': {'num_frames': 64}}, 13) == tiles


@pytest.mark.parametrize('options', [None, {}, {'video': None}, {'video': 5}, {'video': {'num_frames': -1}}])
def test_lmdeploys_default(options):
    assert estimate_tiles([{'content': [video()]}], options, 13) == 32
