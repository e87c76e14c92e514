"""Thresholds against the routing rule applied to every prompt, one by one."""

import numpy as np
import pytest
from parity.reference import route

from lmdeploy_vico.inspection.calibration import Calibration, Scored


def drawn(seed, prompts=40, ties=False):
    """Prompts of one to thirteen tiles; with ``ties``, of few different scores."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(prompts):
        scores = rng.random(int(rng.integers(1, 14)))
        scores = np.round(scores, 1) if ties else scores
        found.append(
            Scored(f'{number}', 'even' if number % 2 == 0 else 'odd', [float(np.float32(one)) for one in scores])
        )
    return found


def counted(prompts, relative, threshold):
    """How many tiles the independent rule compresses."""
    return sum(sum(route(prompt.scores, 'auto', relative, threshold)) for prompt in prompts)


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('relative', [0.0, 0.3])
def test_a_point_is_what_the_rule_does(relative, ties):
    prompts = drawn(1, ties=ties)
    calibration = Calibration(prompts, relative)
    tiles = sum(len(prompt.scores) for prompt in prompts)
    for threshold in (0.0, 0.25, 0.5, 0.55, 0.93, 1.0):
        point = calibration.at(threshold)
        assert (point.compressed, point.tiles) == (counted(prompts, relative, threshold), tiles)
        assert point.saved == pytest.approx(0.75 * point.share)
        kinds = calibration.by_kind(threshold)
        assert list(kinds) == ['even', 'odd']
        assert sum(kind.compressed for kind in kinds.values()) == point.compressed
        even = [prompt for prompt in prompts if prompt.kind == 'even']
        assert kinds['even'].compressed == counted(even, relative, threshold)


@pytest.mark.parametrize('target', [0.0, 0.1, 0.37, 0.5, 0.7])
def test_the_target_is_met_within_a_tile(target):
    prompts = drawn(2)
    found = Calibration(prompts, 0.0).nearest(target)
    assert abs(found.compressed - target * found.tiles) <= 0.5 + 1e-9
    assert counted(prompts, 0.0, found.threshold) == found.compressed, 'with the threshold as it is printed'


@pytest.mark.parametrize('target', [0.2, 0.4, 0.6])
def test_no_threshold_is_nearer(target):
    """Tiles of the same score are compressed together: of all thresholds there are, none comes nearer."""
    prompts = drawn(3, ties=True)
    found = Calibration(prompts, 0.0).nearest(target)
    every = [counted(prompts, 0.0, step / 1000) for step in range(1001)]
    assert abs(found.compressed - target * found.tiles) == min(abs(count - target * found.tiles) for count in every)


def test_more_than_can_be_compressed():
    """The lowest score of each prompt stays: with a quantile of 0, so many tiles as there are prompts."""
    prompts = drawn(4)
    calibration = Calibration(prompts, 0.0)
    most = calibration.most
    assert most.compressed == most.tiles - len(prompts)
    assert calibration.nearest(1.0).compressed == most.compressed
    alone = Calibration([Scored('one', '.', [0.9])], 0.0)
    assert alone.most.compressed == alone.nearest(0.5).compressed == 0


def test_the_curve_goes_from_nothing_to_all_that_can_be():
    calibration = Calibration(drawn(5), 0.0)
    curve = calibration.curve()
    counts = [point.compressed for point in curve]
    assert counts == sorted(set(counts)) and counts[0] == 0 and counts[-1] == calibration.most.compressed
    assert len(curve) == 11
    assert len(Calibration([Scored('one', '.', [0.9, 0.2])], 0.0).curve()) == 2, 'no point comes twice'
