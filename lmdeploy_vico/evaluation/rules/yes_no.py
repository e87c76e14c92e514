"""Rules for questions that are answered by yes or no."""

import re
from collections.abc import Sequence

import numpy as np

from lmdeploy_vico.evaluation.data import Question
from lmdeploy_vico.evaluation.rules.rule import Rule, ratio


def yes_or_no(said: str) -> str | None:
    """``yes`` or ``no``, whichever an answer says; None if it says neither or both."""
    words = set(re.findall(r'\w+', said.lower()))
    there = words & {'yes', 'no'}
    return there.pop() if len(there) == 1 else None


class YesNo(Rule):
    """Right if it says what it should."""

    instruction = 'Answer yes or no.'

    def points(self, question: Question, said: str) -> float:
        """1 if it does."""
        return float(yes_or_no(said) == question.answer.strip().lower())


class Pope(YesNo):
    """POPE (Li et al. 2023): F1 of the answer yes, in percent.

    Questions that are in several of its three sets name them with commas in between, and count once for each.
    """

    name = 'pope'
    unit = 'F1 %'

    def categories(self, question: Question) -> Sequence[str]:
        """The sets that it is in."""
        return [name.strip() for name in (question.category or '').split(',') if name.strip()]

    def statistics(self, questions: Sequence[Question], said: Sequence[str]) -> np.ndarray:
        """True positives, false positives and false negatives, ``[questions, 3]``."""
        wanted = np.array([question.answer.strip().lower() == 'yes' for question in questions])
        there = np.array([yes_or_no(answer) == 'yes' for answer in said])
        times = np.array([[max(1, len(self.categories(question)))] for question in questions])
        return times * np.stack([wanted & there, ~wanted & there, wanted & ~there], axis=1).astype(np.float64)

    def score(self, sums: np.ndarray) -> np.ndarray:
        """Twice the true positives, by these and all mistakes."""
        right, *wrong = np.moveaxis(sums, -1, 0)
        return ratio(200 * right, 2 * right + wrong[0] + wrong[1])


class Mme(YesNo):
    """MME (Fu et al. 2023): of each category the share of right answers and of pictures with both answers right.

    Two questions are asked about a picture, so a category has up to 200 points, and the 14 of MME have 2,800.
    """

    name = 'mme'
    unit = 'points'

    def statistics(self, questions: Sequence[Question], said: Sequence[str]) -> np.ndarray:
        """Of each picture, in the columns of its category: right answers, questions, all right, 1."""
        columns = {category: 4 * number for number, category in enumerate(sorted({str(q.category) for q in questions}))}
        units: dict[tuple[str, str], list[float]] = {}
        for question, answer in zip(questions, said, strict=True):
            units.setdefault((str(question.category), question.group), []).append(self.points(question, answer))
        statistics = np.zeros((len(units), 4 * len(columns)))
        for row, ((category, _), points) in zip(statistics, units.items(), strict=True):
            row[columns[category] :][:4] = sum(points), len(points), min(points), 1
        return statistics

    def score(self, sums: np.ndarray) -> np.ndarray:
        """The points of all categories."""
        right, asked, whole, pictures = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 4), -1, 0)
        return (100 * (ratio(right, asked) + ratio(whole, pictures))).sum(-1)
