"""Retention and its interval."""

import numpy as np
import pytest

from lmdeploy_vico.evaluation.answers import Answer
from lmdeploy_vico.evaluation.data import DataSet, Question
from lmdeploy_vico.evaluation.rules import RULES
from lmdeploy_vico.evaluation.scores import results, retention

EXACT = RULES['exact']


def statistics(points):
    return np.stack([np.asarray(points, float), np.ones(len(points))], axis=1)


def test_the_interval_covers_what_is_true():
    """Of 300 experiments with 200 questions each, about 95 % hold the true retention in their interval."""
    rng = np.random.default_rng(0)
    right_full, stays_right, becomes_right = 0.7, 0.95, 0.1
    true = 100 * (right_full * stays_right + (1 - right_full) * becomes_right) / right_full
    covered = 0
    for seed in range(300):
        full = rng.random(200) < right_full
        compressed = np.where(full, rng.random(200) < stays_right, rng.random(200) < becomes_right)
        _, low, high = retention(EXACT.score, statistics(compressed), statistics(full), seed)
        covered += low <= true <= high
    assert 0.91 <= covered / 300 <= 0.985


def test_pairs_are_drawn_together():
    """Where compression changes no answer, nothing is uncertain about what is retained."""
    points = [1, 0, 1, 1, 0, 0, 1]
    assert retention(EXACT.score, statistics(points), statistics(points)) == (100, 100, 100)


def test_nothing_to_retain():
    assert retention(EXACT.score, statistics([1, 0]), statistics([0, 0])) == (None, None, None)


@pytest.fixture
def data():
    questions = [Question(str(n), '?', 'yes', category='even' if n % 2 == 0 else 'odd') for n in range(4)]
    return DataSet('data', questions)


def answers(data, **said):
    """Answers by compression: texts, and image tokens of each."""
    return {
        (data.name, question.index, compression): Answer(
            data.name, question.index, compression, text, prompt_tokens=10 + (tokens or 0), image_tokens=tokens,
            error='lost' if text is None else None,
        )
        for compression, (texts, counts) in said.items()
        for question, text, tokens in zip(data.questions, texts, counts, strict=True)
    }  # fmt: skip


def test_results(data):
    given = answers(
        data,
        none=(['yes', 'yes', 'yes', 'no'], [256, 512, 256, 256]),
        all=(['yes', 'no', 'yes', 'no'], [64, 128, 64, 256]),
    )
    lines = {(line.category, line.compression): line for line in results(data, EXACT, ['none', 'all'], given)}
    assert set(lines) == {(c, one) for c in (None, 'even', 'odd') for one in ('none', 'all')}
    whole = lines[None, 'all']
    assert (whole.correct, whole.total, whole.score) == (2, 4, 50)
    assert whole.retention == pytest.approx(100 * 2 / 3)
    assert whole.retention_low < whole.retention < whole.retention_high
    assert (whole.tiles, whole.compressed_tiles) == (5, 4)
    assert whole.mean_prompt_tokens == 10 + 512 / 4
    assert lines['even', 'all'].retention == 100 and lines['odd', 'all'].score == 0
    assert lines[None, 'none'].retention == 100 and lines[None, 'none'].compressed_tiles == 0


def test_only_what_was_answered_everywhere_counts(data):
    given = answers(data, none=(['yes'] * 4, [256] * 4), all=(['yes', None, 'yes', 'yes'], [64] * 4))
    assert {line.total for line in results(data, EXACT, ['none', 'all'], given) if line.category is None} == {3}
    assert [line.total for line in results(data, EXACT, ['none', 'all'], given) if line.category == 'odd'] == [1, 1]


def test_a_server_that_counts_no_visual_tokens(data):
    given = answers(data, none=(['yes'] * 4, [None] * 4), all=(['yes'] * 4, [None] * 4))
    line = results(data, EXACT, ['none', 'all'], given)[1]
    assert (line.tiles, line.compressed_tiles) == (None, None)
