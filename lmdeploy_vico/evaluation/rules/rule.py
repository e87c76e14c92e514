"""What every rule has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from lmdeploy_vico.evaluation.data import Question


class Rule(ABC):
    """Gives points to answers, and a score to all of them.

    Attributes:
        name: of the rule, as ``--rule`` takes it.
        instruction: what a model is told about the form of its answer.
        unit: what the score is counted in.
    """

    name: ClassVar[str]
    instruction: ClassVar[str] = 'Answer with a single word or phrase.'
    unit: ClassVar[str] = '%'

    @abstractmethod
    def points(self, question: Question, said: str) -> float:
        """From 0, wrong, to 1, right."""

    def categories(self, question: Question) -> Sequence[str]:
        """Those that a question counts in."""
        return [question.category] if question.category else []

    def statistics(self, questions: Sequence[Question], said: Sequence[str]) -> np.ndarray:
        """What the score is computed of, float64 ``[units, k]``, summed over the units.

        A unit is a question, or questions that are judged together. Units are resampled for intervals, so they must not
        depend on what has been answered.
        """
        points = [self.points(question, answer) for question, answer in zip(questions, said, strict=True)]
        return np.stack([np.asarray(points, np.float64), np.ones(len(points))], axis=1)

    def score(self, sums: np.ndarray) -> np.ndarray:
        """The scores ``[...]`` of sums of statistics ``[..., k]``: here the mean of the points, in percent."""
        return ratio(100 * sums[..., 0], sums[..., 1])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """``numerator / denominator``, 0 where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
