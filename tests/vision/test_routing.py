from fractions import Fraction

import numpy as np
import pytest
import torch

from lmdeploy_vico.choices import Experiment, Pressed
from lmdeploy_vico.vision.routing import route, route_prompt

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


@pytest.mark.parametrize(
    'base, extra, expected',
    [
        ('none', 0.25, [False, True, False, False]),
        ('auto', 0.25, [False, True, True, True]),
        ('auto', 0.5, [True, True, True, True]),
        (0.25, 0.5, [False, True, True, True]),
        (0.25, 0.1, [False, True, False, False]),
        (0.25, 0.49, [False, True, True, False]),
        ('all', 0.5, [True, True, True, True]),
    ],
)
def test_pressure_compresses_the_highest_scores_that_are_left(base, extra, expected):
    assert chosen([0.2, 0.9, 0.7, 0.6], Pressed(base, extra)) == expected


@pytest.mark.parametrize('base', ['none', 'auto', 0.3])
@pytest.mark.parametrize('extra', [0.125, 0.29, 0.5, 1.0])
@pytest.mark.parametrize('counts', [[1] * 8, [3, 1, 2, 1], [7], [50]])
def test_pressure_is_bounded_where_each_image_is_routed_by_itself(base, extra, counts):
    scores = torch.rand(sum(counts), generator=torch.Generator().manual_seed(1))

    def compressed(compression):
        groups = [([image], compression) for image in range(len(counts))]
        return route_prompt(scores, [], counts, groups, *THRESHOLDS.values())

    further = compressed(Pressed(base, extra)) & ~compressed(base)
    assert further.sum() <= extra * len(scores)
    if base == 'none':
        assert further.sum() == sum(Fraction(str(extra)) * count // 1 for count in counts)


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


# --- experiments -----------------------------------------------------------------------------------------------------


def drawn(digests, share, scores=None):
    scores = torch.zeros(len(digests)) if scores is None else scores
    return route(scores, Experiment('random', share), digests=digests, **THRESHOLDS).tolist()


@pytest.mark.parametrize(
    'share, tiles, expected', [(0.0, 7, 0), (1.0, 7, 7), (0.5, 7, 4), (0.29, 50, 15), (0.05, 10, 1)]
)
def test_as_many_tiles_at_random_as_by_score(share, tiles, expected):
    digests = [bytes([index]) * 16 for index in range(tiles)]
    assert sum(drawn(digests, share)) == expected == sum(chosen([0.5] * tiles, share))


def test_tiles_at_random_depend_on_their_pixels_alone():
    digests = [bytes([index]) * 16 for index in range(20)]
    first = dict(zip(digests, drawn(digests, 0.5), strict=True))
    order = np.random.default_rng(0).permutation(20)
    assert drawn([digests[i] for i in order], 0.5, torch.rand(20)) == [first[digests[i]] for i in order]
    more = dict(zip(digests, drawn(digests, 0.75), strict=True))
    assert all(more[digest] for digest in digests if first[digest])  # a larger share compresses others in addition


def test_tiles_with_the_same_pixels_are_drawn_by_their_place():
    assert drawn([b'same'] * 4, 0.5) == [True, True, False, False]


def test_random_shares_are_near_what_they_say_for_each_tile():
    """No tile is preferred by its place: each is compressed in about a third of many prompts."""
    counts = np.zeros(6)
    for prompt in range(600):
        counts += drawn([bytes([prompt % 256, prompt // 256, index]) for index in range(6)], 1 / 3)
    assert counts.min() > 150 and counts.max() < 250


def test_whole_images_by_the_mean_of_their_scores():
    scores = torch.tensor([0.9, 0.5, 0.2, 0.9, 0.7, 0.7])
    mode = Experiment('image', 0.7)
    compressed = route_prompt(scores, [], [2, 2, 1, 1], [([0, 1, 2, 3], mode)], *THRESHOLDS.values())
    assert compressed.tolist() == [True, True, False, False, True, True]


def test_groups_with_experiments_of_their_own():
    scores, digests = torch.tensor([0.9, 0.1, 0.9, 0.1]), [bytes([index]) for index in range(4)]
    groups = [([0], Experiment('image', 0.6)), ([1], Experiment('random', 0.5))]
    compressed = route_prompt(scores, digests, [2, 2], groups, *THRESHOLDS.values())
    assert compressed.tolist() == [False, False, *drawn(digests[2:], 0.5)]
