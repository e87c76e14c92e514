"""Resizing must give Pillow's pixels, to the last bit."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lmdeploy_vico.vision import resample
from lmdeploy_vico.vision.resample import cut, pass_order, resize_into_tiles


def picture(width, height, kind):
    rng = np.random.default_rng(width * 10007 + height)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 'extreme':  # sums overshoot 0 and 255
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    return Image.fromarray(pixels)


def pillow_tiles(image, side, columns, rows):
    tiles = np.empty((columns * rows, side, side, 3), np.uint8)
    cut(np.asarray(image.resize((columns * side, rows * side))), tiles, columns)
    return tiles


def our_tiles(image, side, columns, rows):
    tiles = np.full((columns * rows, side, side, 3), 77, np.uint8)
    resize_into_tiles(image, tiles, columns)
    return tiles


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    side=st.integers(1, 60),
    columns=st.integers(1, 4),
    rows=st.integers(1, 4),
    kind=st.sampled_from(['noise', 'extreme']),
)
@example(width=150, height=320, side=50, columns=2, rows=2, kind='extreme')  # columns first, by a little
@example(width=150, height=200, side=50, columns=2, rows=2, kind='extreme')  # rows first, by a little
@example(width=100, height=100, side=50, columns=2, rows=2, kind='noise')  # nothing to do
def test_same_pixels_as_pillow(width, height, side, columns, rows, kind):
    image = picture(width, height, kind)
    expected = pillow_tiles(image, side, columns, rows)
    np.testing.assert_array_equal(our_tiles(image, side, columns, rows), expected)


@pytest.mark.parametrize('size', [(1, 1), (3000, 40), (40, 3000), (1500, 1500), (1345, 4000)])
def test_real_sizes(size):
    image = picture(*size, 'extreme')
    for columns, rows in ((1, 1), (3, 2), (1, 5)):
        np.testing.assert_array_equal(our_tiles(image, 448, columns, rows), pillow_tiles(image, 448, columns, rows))


def test_of_a_part_of_a_larger_picture():
    image = picture(300, 200, 'noise').crop((20, 30, 250, 190))
    np.testing.assert_array_equal(our_tiles(image, 60, 2, 1), pillow_tiles(image, 60, 2, 1))


def test_the_installed_pillow_is_understood():
    assert pass_order() is not None


def test_another_pillow_is_left_to_itself(monkeypatch, caplog):
    def resize(self, size):
        return Image.new('RGB', size, (1, 2, 3))

    monkeypatch.setattr(Image.Image, 'resize', resize)
    pass_order.cache_clear()
    try:
        assert set(our_tiles(picture(50, 50, 'noise'), 20, 1, 1)[0, 0, 0]) == {1, 2, 3}
        assert 'left to it' in caplog.text
    finally:
        pass_order.cache_clear()


@pytest.mark.parametrize('rule', [resample._never, resample._if_it_shrinks_far_more])
def test_either_order_of_a_pillow_is_recognised(monkeypatch, rule):
    def resize(self, size):
        pixels = np.asarray(self)
        if rule(*self.size, *size):
            return Image.fromarray(resample._columns_first(pixels, size))
        out = np.empty((size[1], size[0] * 3), np.uint8)
        return Image.fromarray(resample._rows_first(pixels, size, out).reshape(size[1], size[0], 3))

    monkeypatch.setattr(Image.Image, 'resize', resize)
    pass_order.cache_clear()
    try:
        assert pass_order() is rule
    finally:
        pass_order.cache_clear()
