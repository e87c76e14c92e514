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


def drawn_exact(rng, units):
    """Answers of which compression loses a twentieth, and sets right a tenth of the others."""
    full = rng.random(units) < 0.7
    compressed = np.where(full, rng.random(units) < 0.95, rng.random(units) < 0.1)
    return statistics(compressed), statistics(full)


def drawn_pope(rng, units):
    """Answers to as many questions for yes as for no, of which compression turns 7 % round."""
    wanted = rng.random(units) < 0.5
    full = np.where(wanted, rng.random(units) < 0.85, rng.random(units) < 0.1)
    compressed = full ^ (rng.random(units) < 0.07)
    return tuple(
        np.stack([wanted & said, ~wanted & said, wanted & ~said], axis=1).astype(float) for said in (compressed, full)
    )


def drawn_mme(rng, units):
    """Two answers each about pictures of two categories, of which compression turns 5 % round."""
    category = rng.integers(2, size=units)
    full = rng.random((units, 2)) < 0.8
    compressed = full ^ (rng.random((units, 2)) < 0.05)
    columns = np.zeros((2, units, 2, 4))
    for sums, right in zip(columns, (compressed, full), strict=True):
        ones = np.ones(units)
        sums[np.arange(units), category] = np.stack([right.sum(1), 2 * ones, right.all(1), ones], axis=1)
    return columns.reshape(2, units, 8)


@pytest.mark.parametrize('rule, draw', [('exact', drawn_exact), ('pope', drawn_pope), ('mme', drawn_mme)])
def test_the_interval_covers_what_is_true(rule, draw):
    """Of 200 experiments with 200 units each, about 95 % hold the true retention in their interval."""
    score = RULES[rule].score
    compressed, full = draw(np.random.default_rng(10**6), 400_000)
    true = 100 * score(compressed.sum(0)) / score(full.sum(0))
    covered = 0
    for seed in range(200):
        _, low, high = retention(score, *draw(np.random.default_rng(seed), 200), seed)
        covered += low <= true <= high
    assert 0.9 <= covered / 200 <= 0.985


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


def test_a_question_in_several_categories_counts_once_in_each():
    categories = ['popular,random', 'random', 'popular']
    questions = [Question(str(n), '?', 'yes', category=category) for n, category in enumerate(categories)]
    data = DataSet('POPE', questions)
    given = answers(data, none=(['yes', 'no', 'yes'], [256] * 3))
    found = {line.category: (line.total, line.score) for line in results(data, RULES['pope'], ['none'], given)}
    assert found == {
        None: (3, pytest.approx(100 * 6 / 7)),
        'popular': (2, 100),
        'random': (2, pytest.approx(100 * 2 / 3)),
    }


def test_only_what_was_answered_everywhere_counts(data):
    given = answers(data, none=(['yes'] * 4, [256] * 4), all=(['yes', None, 'yes', 'yes'], [64] * 4))
    assert {line.total for line in results(data, EXACT, ['none', 'all'], given) if line.category is None} == {3}
    assert [line.total for line in results(data, EXACT, ['none', 'all'], given) if line.category == 'odd'] == [1, 1]


def test_a_server_that_counts_no_visual_tokens(data):
    given = answers(data, none=(['yes'] * 4, [None] * 4), all=(['yes'] * 4, [None] * 4))
    line = results(data, EXACT, ['none', 'all'], given)[1]
    assert (line.tiles, line.compressed_tiles) == (None, None)
