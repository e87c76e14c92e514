"""Which images of a prompt are routed together."""

from PIL import Image
from stage.stand_in import job

from lmdeploy_vico.stage.jobs import routing_groups

PICTURE = Image.new('RGB', (8, 8))


def groups(*options, compression='auto'):
    return routing_groups([job(PICTURE, **one) for one in options], compression)


def test_images_without_a_compression_of_their_own_are_one_group():
    assert groups({}, {}, compression='none') == [([0, 1], 'none')]


def test_an_image_with_its_own_compression_is_routed_alone():
    own = {'compression': 'all'}
    assert groups({}, own, {}, own) == [([0, 2], 'auto'), ([1], 'all'), ([3], 'all')]


def test_frames_of_a_video_with_its_own_compression_are_one_group_for_each_video():
    first, second = ({'compression': 0.5, 'routed_with': video} for video in (0, 1))
    assert groups(first, first, second, {}) == [([0, 1], 0.5), ([2], 0.5), ([3], 'auto')]


def test_frames_of_a_video_without_one_are_routed_with_the_prompt():
    assert groups({}, {'routed_with': 0}, {'routed_with': 0}) == [([0, 1, 2], 'auto')]


def test_no_images():
    assert groups() == []
