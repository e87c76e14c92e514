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


@pytest.mark.parametrize('share, reached', [(0.0, 0.0), (0.2, 0.2), (0.45, 0.4), (1.0, 0.6)])
def test_the_threshold_that_is_fitted(share, reached):
    fitted = fit_threshold(SCORES, 0.0, share)
    assert fitted.relative == 0.0
    assert compressed_share(SCORES, fitted) == pytest.approx(reached)
    assert np.abs(np.concatenate(SCORES) - fitted.absolute).min() > 0.04, 'it stands between scores'


def test_a_verdict_in_numbers():
    own, classes = np.array([0.9, 0.2, 0.8, 0.4]), np.array([0, 1, 1, 1])
    report = Verdict(own, classes, SCORES, Thresholds(0.0, 0.5)).as_json()
    assert report['labels'] == {'compress': 1, 'keep': 3}
    assert report['agreement'] == 0.75
    assert report['scores']['compress']['0.5'] == 0.9 and report['scores']['keep']['0.5'] == 0.4
    assert report['compressed tiles'] == pytest.approx(0.4)
    assert report['visual tokens removed'] == pytest.approx(0.3)
