"""What is reported of a trained router."""

import numpy as np
import pytest

from lmdeploy_vico.training.stages.verdict import Thresholds, Verdict, compressed_share, fit_threshold

SCORES = [np.array([0.9, 0.2, 0.7, 0.4], np.float32), np.array([0.8], np.float32), np.empty(0, np.float32)]


def test_the_share_is_the_servers():
    """Above the quantile strictly, so never the lowest of a prompt; at or above the absolute threshold."""
    assert compressed_share(SCORES, Thresholds(0.0, 0.5)) == pytest.approx(2 / 5)
    assert compressed_share(SCORES, Thresholds(0.0, 0.0)) == pytest.approx(3 / 5)
    assert compressed_share(SCORES, Thresholds(0.5, 0.0)) == pytest.approx(2 / 5)
    assert compressed_share([np.empty(0)], Thresholds(0.0, 0.0)) == 0


@pytest.mark.parametrize('share, threshold', [(0.0, 0.9), (0.2, 0.9), (0.4, 0.7), (1.0, 0.2)])
def test_the_threshold_that_is_fitted(share, threshold):
    fitted = fit_threshold(SCORES, 0.0, share)
    shares = [abs(compressed_share(SCORES, Thresholds(0.0, each)) - share) for each in (0.9, 0.8, 0.7, 0.4, 0.2)]
    assert abs(compressed_share(SCORES, fitted) - share) == min(shares)
    assert fitted.relative == 0.0
    assert compressed_share(SCORES, fitted) == compressed_share(SCORES, Thresholds(0.0, threshold))


def test_a_verdict_in_numbers():
    own, classes = np.array([0.9, 0.2, 0.8, 0.4]), np.array([0, 1, 1, 1])
    report = Verdict(own, classes, SCORES, Thresholds(0.0, 0.5)).as_json()
    assert report['labels'] == {'compress': 1, 'keep': 3}
    assert report['agreement'] == 0.75
    assert report['scores']['compress']['0.5'] == 0.9 and report['scores']['keep']['0.5'] == 0.4
    assert report['compressed tiles'] == pytest.approx(0.4)
    assert report['visual tokens removed'] == pytest.approx(0.3)
