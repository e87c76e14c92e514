"""Labels of the router's training (paper, Eq. 3): is a tile's loss ratio below a percentile of the last ones?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmdeploy_vico.training.stages.ratios import Losses, ratio

COMPRESS, KEEP = 0, 1  # the classes
OTHER_EPSILONS = (0.0, 0.001, 0.01, 0.1)


@dataclass(frozen=True)
class Labels:
    """What each place of a run is labelled.

    Attributes:
        classes: int ``[n]``; 0 where the tile can be compressed.
        thresholds: tau of each place's step, ``[n]``.
    """

    classes: np.ndarray
    thresholds: np.ndarray


def label(ratios: Sequence[float], batch: int, window: int, percentile: float) -> Labels:
    """Label the places of a run in their order.

    Args:
        ratios: of each place.
        batch: places of a step; a step's own ratios belong to its window.
        window: how many of the last ratios the percentile is taken of.
        percentile: from 0 to 100.
    """
    values = np.asarray(ratios, dtype=np.float64)
    thresholds = np.empty_like(values)
    for start in range(0, len(values), batch):
        end = min(start + batch, len(values))
        thresholds[start:end] = threshold(values[max(0, end - window) : end], percentile)
    return Labels(classify(values, thresholds), thresholds)


def threshold(ratios: Sequence[float] | np.ndarray, percentile: float) -> float:
    """The percentile of ratios, one of them: infinite ones cannot be interpolated."""
    return float(np.percentile(ratios, percentile, method='higher'))


def classify(ratios: np.ndarray, tau: np.ndarray | float) -> np.ndarray:
    """Eq. 3: 0 (compress) where a ratio is less than tau, else 1."""
    return np.where(ratios < tau, COMPRESS, KEEP)


def effect_of_epsilon(
    losses: Sequence[Losses], epsilon: float, batch: int, window: int, percentile: float
) -> dict[str, float]:
    """The share of labels that stay the same with another epsilon, and with the difference of the losses instead.

    Args:
        losses: of each place of a run.
        epsilon: that the run has.
        batch, window, percentile: as for :func:`label`, which labels all of them.
    """
    others = {f'epsilon {other:g}': [ratio(each, other) for each in losses] for other in OTHER_EPSILONS}
    others['difference'] = [each.compressed - each.full for each in losses]
    chosen = label([ratio(each, epsilon) for each in losses], batch, window, percentile).classes
    return {
        name: float(np.mean(label(values, batch, window, percentile).classes == chosen))
        for name, values in others.items()
    }
