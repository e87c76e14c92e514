"""Tiles must be pixel-identical to those LMDeploy cuts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmdeploy.vl.model.internvl import dynamic_preprocess
from PIL import Image

from lmdeploy_vico.vision.tiling import Tiling, choose_grid, cut_tiles, tile_digests


def lmdeploy_tiles(image: Image.Image, min_tiles: int, max_tiles: int, use_thumbnail: bool) -> np.ndarray:
    tiles = dynamic_preprocess(image, min_tiles, max_tiles, image_size=448, use_thumbnail=use_thumbnail)
    return np.stack([np.asarray(tile.convert('RGB')) for tile in tiles])


def noise(width: int, height: int, mode: str) -> Image.Image:
    pixels = np.random.default_rng(width * 10007 + height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, 'RGBA')
    if mode == 'RGBA':
        return image
    return image.convert('RGB').convert(mode)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'P', '1', 'CMYK', 'LA'])
@pytest.mark.parametrize('size', [(1, 1), (447, 449), (640, 480), (2000, 20), (30, 1500), (1344, 1344)])
def test_same_pixels_as_lmdeploy(mode, size):
    image = noise(*size, 'RGB').convert('RGBA').convert(mode) if mode == 'LA' else noise(*size, mode)
    expected = lmdeploy_tiles(image, 1, 12, True)
    np.testing.assert_array_equal(cut_tiles(image, 1, 12, True), expected)


@pytest.mark.parametrize('min_tiles, max_tiles', [(1, 1), (1, 6), (2, 2), (4, 12), (1, 24), (3, 40)])
def test_same_pixels_for_other_limits(min_tiles, max_tiles):
    for size in [(500, 400), (400, 500), (448, 448), (1792, 448)]:
        image = noise(*size, 'RGB')
        expected = lmdeploy_tiles(image, min_tiles, max_tiles, False)
        np.testing.assert_array_equal(cut_tiles(image, min_tiles, max_tiles, False), expected)


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), max_tiles=st.sampled_from([1, 2, 6, 12, 24]))
def test_same_grid_as_lmdeploy(width, height, max_tiles):
    class Sized:
        size = (width, height)
        resized_to = None

        def resize(self, size):
            self.resized_to = size
            return self

        def crop(self, box):
            return box

    image = Sized()
    dynamic_preprocess(image, 1, max_tiles, image_size=448, use_thumbnail=False)
    columns, rows = choose_grid(width, height, 1, max_tiles)
    assert (columns * 448, rows * 448) == image.resized_to


def test_ties_are_broken_by_the_number_of_pixels():
    # 1:1 fits the grids 1x1, 2x2 and 3x3 equally well.
    assert choose_grid(300, 300, 1, 12) == (1, 1)
    assert choose_grid(900, 900, 1, 12) == (2, 2)
    assert choose_grid(1344, 1344, 1, 12) == (3, 3)


def test_extreme_aspect_ratio():
    assert choose_grid(20000, 20, 1, 12) == (12, 1)
    assert Tiling(1, 12).grid((20000, 20)).tiles == 13


@pytest.mark.parametrize('size, tiles', [((448, 448), 1), ((1344, 1344), 10), ((1792, 1344), 13)])
def test_tile_count_agrees_with_the_tiles(size, tiles):
    assert Tiling(1, 12).grid(size).tiles == tiles == len(cut_tiles(noise(*size, 'RGB'), 1, 12))


def test_digests_name_the_content():
    tiles = cut_tiles(noise(900, 450, 'RGB'), 1, 12)
    digests = tile_digests(tiles)
    assert len(set(digests)) == len(tiles) == 3
    changed = tiles.copy()
    changed[1, 447, 447, 2] ^= 1
    assert [a == b for a, b in zip(digests, tile_digests(changed), strict=True)] == [True, False, True]
    salted = tile_digests(tiles, 'ä'), tile_digests(tiles, 'b')
    assert len({*digests, *salted[0], *salted[1]}) == 9
    assert {len(digest) for digest in salted[0]} == {len(digest) for digest in digests}
    assert tile_digests(tiles, 'ä') == salted[0]
