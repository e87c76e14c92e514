"""Labels: their direction, the window, the percentile, and what epsilon changes."""

import numpy as np
import pytest

from lmdeploy_vico.training.stages.labels import classify, effect_of_epsilon, label, threshold
from lmdeploy_vico.training.stages.ratios import Losses


def test_what_can_be_compressed_is_class_0():
    """Eq. 3: a ratio below tau has a low compression impact; at tau it has not."""
    assert classify(np.array([0.5, 2.0, 3.0]), 2.0).tolist() == [0, 1, 1]


def test_the_percentile_is_the_share_that_is_compressed(rng):
    ratios = rng.lognormal(size=4000)
    labels = label(ratios, batch=8, window=512, percentile=60)
    assert np.mean(labels.classes == 0) == pytest.approx(0.6, abs=0.02)
    assert threshold(np.arange(1, 11), 60) == pytest.approx(7)


def test_the_window_slides(rng):
    """Ratios ten times as large later on: the labels follow within a window."""
    ratios = np.concatenate([rng.uniform(1, 2, 400), rng.uniform(10, 20, 400)])
    labels = label(ratios, batch=8, window=80, percentile=60)
    assert labels.thresholds[399] < 2 and labels.thresholds[-1] > 10
    assert (labels.classes[400:416] == 1).all(), 'at first everything seems costly'
    assert np.mean(labels.classes[480:] == 0) == pytest.approx(0.6, abs=0.07)


def test_a_step_is_labelled_by_the_last_ratios_and_its_own():
    ratios = [5, 1, 4, 2, 8, 9]
    labels = label(ratios, batch=2, window=3, percentile=50)
    assert labels.thresholds.tolist() == [5, 5, 2, 2, 8, 8]
    assert labels.classes.tolist() == [1, 0, 1, 1, 1, 1]


def test_infinite_ratios_are_never_compressed():
    labels = label([1.0, np.inf, 2.0, np.inf], batch=4, window=4, percentile=60)
    assert labels.classes.tolist() == [0, 1, 0, 1]
    assert not np.isnan(labels.thresholds).any()


def test_the_effect_of_epsilon_is_the_share_of_equal_labels(rng):
    losses = [Losses(full, full * factor) for full, factor in rng.uniform(0.001, 3, (200, 2))]
    effect = effect_of_epsilon(losses, 0.01, 8, 200, 60)
    assert effect['epsilon 0.01'] == 1
    assert set(effect) == {'epsilon 0', 'epsilon 0.001', 'epsilon 0.01', 'epsilon 0.1', 'difference'}
    assert all(0.5 < share <= 1 for share in effect.values())
    same = [Losses(1.0, factor) for factor in rng.uniform(0, 3, 200)]
    assert set(effect_of_epsilon(same, 0.01, 8, 200, 60).values()) == {1.0}, 'all full alike: every form orders alike'


def test_the_effect_of_epsilon_is_on_the_labels_of_the_run():
    """Losses that grow half way: all forms order the ratios of a window alike, but not those of two."""
    early = [Losses(0.001, 0.001 * factor) for factor in (1, 2, 3, 4)]
    late = [Losses(1.0, factor) for factor in (1, 2, 3, 4)]
    assert set(effect_of_epsilon([*early, *late], 0.01, 4, 4, 60).values()) == {1.0}
    assert min(effect_of_epsilon([*early, *late], 0.01, 8, 8, 60).values()) < 1
