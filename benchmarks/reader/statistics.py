"""Shares of right answers, what is retained of them, and differences between two ways, with intervals.

Questions about one picture are not independent: pictures are resampled, with all that is asked about them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmdeploy_vico.evaluation.answers import Answer
from lmdeploy_vico.evaluation.data import Question

SAMPLES = 4000
INTERVAL = 2.5, 97.5  # percentiles
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A value in percent, and its 95 % interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> list[float]:
        """Rounded to a tenth."""
        return [round(each, 1) for each in (self.value, self.low, self.high)]


def right(questions: Sequence[Question], answers: Mapping[str, Answer]) -> np.ndarray:
    """1 for each question that was answered with exactly the right text, else 0."""
    return np.array([float(answers[question.index].text.strip() == question.answer) for question in questions])


class Resampling:
    """Draws pictures again and again.

    Args:
        questions: their groups say what is asked about one picture.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        _, self._owner = np.unique([question.group for question in questions], return_inverse=True)
        self._count = int(self._owner.max()) + 1
        rng = np.random.default_rng(SEED)
        self._draws = rng.multinomial(self._count, np.full(self._count, 1 / self._count), size=SAMPLES).astype(float)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        return self._draws @ np.bincount(self._owner, values, self._count)

    def mean(self, values: np.ndarray) -> Estimate:
        """The mean of values, in percent."""
        drawn = self._sums(values) / self._sums(np.ones_like(values))
        return _estimate(values.mean(), drawn)

    def ratio(self, values: np.ndarray, of: np.ndarray) -> Estimate:
        """The sum of values to that of others, in percent."""
        return _estimate(values.sum() / of.sum(), self._sums(values) / self._sums(of))


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.percentile(100 * drawn, INTERVAL)
    return Estimate(100 * float(value), float(low), float(high))
