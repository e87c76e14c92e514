"""Scores, what is retained of them under compression, and how sure that is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmdeploy_vico.evaluation.answers import Answer
from lmdeploy_vico.evaluation.data import DataSet, Question
from lmdeploy_vico.evaluation.rules.rule import Rule

NONE = 'none'
TOKENS_FULL, TOKENS_COMPRESSED = 256, 64
SAMPLES = 2000  # of the bootstrap
DRAWN = 2**22  # counts that are held at a time
INTERVAL = 2.5, 97.5  # percentiles


@dataclass(frozen=True)
class Result:
    """One line of the results.

    Attributes:
        data: the data set.
        category: None for all of it.
        compression: as the command line has it.
        correct: points of all answers; whole numbers but for ANLS and VQA score.
        total: questions that were answered at every compression; only they count.
        score: by the data set's rule.
        retention: of the score without compression, in percent, with a 95 % interval; None where that score is 0.
        tiles: of all questions; None if the server does not count visual tokens.
        compressed_tiles: those of them with 64 visual tokens.
        mean_prompt_tokens: of a question.
    """

    data: str
    category: str | None
    compression: str
    correct: float
    total: int
    score: float
    retention: float | None
    retention_low: float | None
    retention_high: float | None
    tiles: int | None
    compressed_tiles: int | None
    mean_prompt_tokens: float


def results(
    data: DataSet,
    rule: Rule,
    compressions: Sequence[str],
    answers: Mapping[tuple[str, str, str], Answer],
    seed: int = 0,
) -> list[Result]:
    """The results of a data set: for all of it and for each category, at each compression.

    Args:
        compressions: with ``none`` among them, with which the others are compared.
        answers: by data set, index and compression.
        seed: of the resampling.
    """
    answered = [question for question in data.questions if _answered(data, question, compressions, answers)]
    groups: list[tuple[str | None, Sequence[Question]]] = [(None, answered)]
    for name in dict.fromkeys(name for question in data.questions for name in rule.categories(question)):
        # Within one of its categories, a question is in no other.
        inside = [replace(question, category=name) for question in answered if name in rule.categories(question)]
        groups.append((name, inside))
    return [
        result
        for category, questions in groups
        if questions
        for result in _results(data, category, rule, compressions, questions, answers, seed)
    ]


def _answered(
    data: DataSet, question: Question, compressions: Sequence[str], answers: Mapping[tuple[str, str, str], Answer]
) -> bool:
    there = [answers.get((data.name, question.index, compression)) for compression in compressions]
    return all(answer is not None and answer.error is None for answer in there)


def _results(
    data: DataSet,
    category: str | None,
    rule: Rule,
    compressions: Sequence[str],
    questions: Sequence[Question],
    answers: Mapping[tuple[str, str, str], Answer],
    seed: int,
) -> list[Result]:
    given = {one: [answers[data.name, question.index, one] for question in questions] for one in compressions}
    statistics = {one: rule.statistics(questions, [answer.text for answer in given[one]]) for one in compressions}
    whole = _tiles(given[NONE])
    lines = []
    for compression in compressions:
        said = given[compression]
        retained = retention(rule.score, statistics[compression], statistics[NONE], seed)
        lines.append(
            Result(
                data=data.name,
                category=category,
                compression=compression,
                correct=sum(rule.points(q, answer.text) for q, answer in zip(questions, said, strict=True)),
                total=len(questions),
                score=float(rule.score(statistics[compression].sum(0))),
                retention=retained[0],
                retention_low=retained[1],
                retention_high=retained[2],
                tiles=whole,
                compressed_tiles=_compressed(said, whole),
                mean_prompt_tokens=sum(answer.prompt_tokens for answer in said) / len(said),
            )
        )
    return lines


def retention(
    score: Callable[[np.ndarray], np.ndarray], compressed: np.ndarray, full: np.ndarray, seed: int = 0
) -> tuple[float, float, float] | tuple[None, None, None]:
    """What is left of a score, in percent, and the 95 % interval of a paired bootstrap over the units.

    Args:
        score: from sums of statistics ``[..., k]`` to scores ``[...]``.
        compressed: statistics ``[units, k]`` with compression.
        full: those of the same units without.
        seed: of the resampling.

    Returns:
        The percentage, its lower and its upper bound; all None where the score without compression is 0.
    """
    before = float(score(full.sum(0)))
    if not before:
        return None, None, None
    # The same units for both: the questions differ far more than the two answers to one.
    both = np.concatenate([compressed, full], axis=1)
    sums = np.concatenate([drawn @ both for drawn in _draws(len(full), np.random.default_rng(seed))])
    kept, whole = score(sums[:, : compressed.shape[1]]), score(sums[:, compressed.shape[1] :])
    low, high = np.percentile(100 * kept[whole > 0] / whole[whole > 0], INTERVAL)
    return 100 * float(score(compressed.sum(0))) / before, float(low), float(high)


def _draws(units: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each unit is drawn in each sample, ``[samples, units]``, some samples at a time."""
    for first in range(0, SAMPLES, size := max(1, DRAWN // units)):
        yield rng.multinomial(units, np.full(units, 1 / units), size=min(size, SAMPLES - first)).astype(np.float64)


def _tiles(uncompressed: Sequence[Answer]) -> int | None:
    """Tiles of all prompts: without compression each has 256 visual tokens."""
    counts = [answer.image_tokens for answer in uncompressed]
    return None if None in counts else sum(count for count in counts if count is not None) // TOKENS_FULL


def _compressed(answers: Sequence[Answer], tiles: int | None) -> int | None:
    if tiles is None or any(answer.image_tokens is None for answer in answers):
        return None
    saved = tiles * TOKENS_FULL - sum(answer.image_tokens or 0 for answer in answers)
    return saved // (TOKENS_FULL - TOKENS_COMPRESSED)
