import numpy as np
import pytest
import torch

from lmdeploy_vico.vision.routing import route

THRESHOLDS = {'relative_threshold': 0.5, 'absolute_threshold': 0.5}


def chosen(scores, compression, **thresholds):
    return route(torch.tensor(scores), compression, **{**THRESHOLDS, **thresholds}).tolist()


def test_auto_needs_both_thresholds():
    assert chosen([0.9, 0.8, 0.2, 0.1], 'auto') == [True, True, False, False]
    assert chosen([0.45, 0.4, 0.2, 0.1], 'auto') == [False] * 4  # above the quantile, below the absolute threshold
    assert chosen([0.99, 0.9, 0.8, 0.7], 'auto') == [True, True, False, False]


def test_the_quantile_comparison_is_strict():
    assert chosen([0.9], 'auto') == [False]
    assert chosen([0.9, 0.9, 0.9], 'auto') == [False] * 3
    assert chosen([0.9, 0.6, 0.1], 'auto') == [True, False, False]


def test_the_absolute_comparison_is_not():
    assert chosen([0.5, 0.1], 'auto') == [True, False]


def test_quantile_interpolates_linearly():
    scores = np.random.default_rng(0).random(13).astype(np.float32)
    for relative in (0.0, 0.3, 0.6, 0.77, 1.0):
        expected = (scores > np.quantile(scores.astype(np.float64), relative)) & (scores >= 0.25)
        assert chosen(scores.tolist(), 'auto', relative_threshold=relative, absolute_threshold=0.25) == list(expected)


def test_none_and_all():
    assert chosen([0.9, 0.1], 'none') == [False, False]
    assert chosen([0.9, 0.1], 'all') == [True, True]
    assert chosen([], 'auto') == []


@pytest.mark.parametrize(
    'fraction, tiles, expected',
    [(0.0, 7, 0), (1.0, 7, 7), (0.5, 7, 4), (0.5, 5, 3), (0.35, 10, 4), (0.29, 50, 15), (0.04, 10, 0), (0.05, 10, 1)],
)
def test_fraction_rounds_half_up(fraction, tiles, expected):
    scores = torch.linspace(1, 0, tiles)
    result = route(scores, fraction, **THRESHOLDS)
    assert result.tolist() == [True] * expected + [False] * (tiles - expected)


def test_fraction_takes_the_highest_scores_and_the_lower_index_on_ties():
    assert chosen([0.1, 0.7, 0.7, 0.9], 0.5) == [False, True, False, True]
    assert chosen([0.7] * 4, 0.5) == [True, True, False, False]
