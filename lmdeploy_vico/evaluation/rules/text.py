"""Rules that compare what was said with the accepted answers as text."""

import re

import numpy as np

from lmdeploy_vico.evaluation.data import Question
from lmdeploy_vico.evaluation.rules.rule import Rule

FORMULAS = 'Handwritten Mathematical Expression Recognition'


def plain(text: str) -> str:
    """Text in lower case with single spaces and no full stop at its end, as answers are compared."""
    return ' '.join(text.split()).lower().rstrip('.')


class ExactMatch(Rule):
    """Right if it is one of the accepted answers; case, spaces and a full stop do not count."""

    name = 'exact'

    def points(self, question: Question, said: str) -> float:
        """1 if it matches."""
        return float(plain(said) in {plain(answer) for answer in question.answers})


class RelaxedAccuracy(Rule):
    """ChartQA's relaxed accuracy (Masry et al. 2022): numbers may be off by 5 %, texts not at all."""

    name = 'relaxed'
    TOLERANCE = 0.05

    def points(self, question: Question, said: str) -> float:
        """1 if one of the accepted answers is met."""
        return float(any(self._meets(answer, said) for answer in question.answers))

    def _meets(self, wanted: str, said: str) -> bool:
        number, meant = _number(said), _number(wanted)
        if number is not None and meant:  # from 0 there is no relative distance
            return abs(number - meant) / abs(meant) <= self.TOLERANCE
        return said.strip().lower() == wanted.strip().lower()


class Anls(Rule):
    """Average normalised Levenshtein similarity (Biten et al. 2019): 0 where half of the characters or more differ."""

    name = 'anls'
    THRESHOLD = 0.5

    def points(self, question: Question, said: str) -> float:
        """The similarity to the nearest accepted answer."""
        return max(self._similarity(answer, said) for answer in question.answers)

    def _similarity(self, wanted: str, said: str) -> float:
        from rapidfuzz.distance import Levenshtein  # of the extra "eval", and the command line lists this rule

        wanted, said = (' '.join(text.split()).lower() for text in (wanted, said))
        distance = Levenshtein.normalized_distance(wanted, said)
        return 1 - distance if distance < self.THRESHOLD else 0.0


class Contains(Rule):
    """OCRBench's rule (Liu et al. 2024): right if an accepted answer stands in what was said. Of 1,000 points.

    In formulas spaces do not count but case does; elsewhere it is the other way round.
    """

    name = 'contains'
    unit = 'of 1000'

    def points(self, question: Question, said: str) -> float:
        """1 if one of them does."""
        if question.category == FORMULAS:
            return float(any(re.sub(r'\s', '', answer) in re.sub(r'\s', '', said) for answer in question.answers))
        there = said.lower().strip().replace('\n', ' ')
        return float(any(answer.lower().strip().replace('\n', ' ') in there for answer in question.answers))

    def score(self, sums: np.ndarray) -> np.ndarray:
        """The number of right answers, had there been 1,000 questions."""
        return 10 * super().score(sums)


def _number(text: str) -> float | None:
    """The number that a text is; a percentage is a hundredth. With commas between its digits it is none."""
    text = text.strip()
    try:
        number = float(text.removesuffix('%')) / (100 if text.endswith('%') else 1)
    except ValueError:
        return None
    return number if abs(number) < float('inf') else None
