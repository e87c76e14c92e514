"""Draws: uniform, of the right number, and the same wherever a place in the run is computed."""

import numpy as np
import pytest

from lmdeploy_vico.training.compression import draw_sample, draw_share, draw_tile, draw_tiles, one_tile


def test_shares_are_uniform():
    shares = np.array([draw_share(0, place) for place in range(4000)])
    counts, _ = np.histogram(shares, bins=10, range=(0, 1))
    assert counts.min() > 330 and counts.max() < 470  # of 400 each: four standard deviations


@pytest.mark.parametrize('share, tiles, count', [(0, 13, 0), (1, 13, 13), (0.5, 13, 7), (0.49, 1, 0), (0.5, 1, 1)])
def test_so_many_tiles_are_compressed(share, tiles, count):
    for place in range(20):
        assert draw_tiles(3, place, tiles, share).sum() == count


def test_every_tile_is_as_likely():
    times = sum(draw_tiles(0, place, 8, 0.5).astype(int) for place in range(2000))
    assert times.min() > 900 and times.max() < 1100


def test_draws_depend_on_seed_and_place_alone():
    drawn = [(draw_share(1, p), draw_tiles(1, p, 9, 0.4).tolist(), draw_tile(1, p, 9)) for p in range(50)]
    assert drawn == [(draw_share(1, p), draw_tiles(1, p, 9, 0.4).tolist(), draw_tile(1, p, 9)) for p in range(50)]
    assert drawn != [(draw_share(2, p), draw_tiles(2, p, 9, 0.4).tolist(), draw_tile(2, p, 9)) for p in range(50)]
    assert {tile for _, _, tile in drawn} == set(range(9))


def test_every_pass_sees_every_sample_once_in_another_order():
    passes = [[draw_sample(0, turn * 30 + i, 30) for i in range(30)] for turn in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(30))
    assert passes[0] != passes[1]


def test_one_tile():
    assert one_tile(3, 1).tolist() == [False, True, False]
    assert one_tile(3, None).tolist() == [False, False, False]
