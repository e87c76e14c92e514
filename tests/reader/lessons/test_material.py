"""What the language model learns from: facts are where labels are, excerpts hold what is asked for."""

import numpy as np
import pytest
import torch

from lmdeploy_vico.reader.documents.codes import DIGITS, KEYS, Split, is_withheld
from lmdeploy_vico.reader.documents.page import make_tile
from lmdeploy_vico.reader.lessons.material import COMPRESSED, FACTS, FULL, Material, facts_of


class Eyes:
    """In place of a ViT: the mean colour of every patch, which tells tiles apart."""

    def patches(self, tiles):
        count = len(tiles)
        return tiles.float().view(count, 32, 14, 32, 14, 3).mean((2, 4)).view(count, 1024, 3)


def facts(question, answer):
    """The columns that say key and digits of an answer."""
    digits = [len(KEYS) + place * len(DIGITS) + int(digit) for place, digit in enumerate(answer)]
    return [KEYS.index(question.text[8]), *digits]


@pytest.mark.parametrize('kind', ['fine', 'medium'])
@pytest.mark.parametrize('ratio', [FULL, COMPRESSED])
def test_facts_say_what_stands_on_a_tile(kind, ratio):
    tile = make_tile(np.random.default_rng(3), kind, KEYS, Split.TRAIN)
    found = facts_of(tile.labels, ratio)
    assert found.shape == ((32 // ratio) ** 2, FACTS)
    there = {column for question in tile.questions for column in facts(question, question.answer)}
    assert set(torch.nonzero(found.amax(0)).flatten().tolist()) == there


@pytest.mark.parametrize('kind, length', [('fine', 48), ('medium', 96)])
def test_an_excerpt_holds_what_is_asked_for(kind, length):
    material = Material(Eyes(), 1)
    crowd = material.crowd(kind)
    assert len(crowd.entries) > 8
    for _ in range(20):
        seen = material.excerpt(crowd, 6, length)
        assert 1 <= len(seen.questions) <= 6 and seen.counts == [length] == [len(seen.merged)]
        assert len({question.text for question in seen.questions}) == len(seen.questions)
        columns = seen.facts.amax(0)
        for question in seen.questions:
            assert columns[facts(question, question.answer)].all()


def test_blank_tokens_are_blank():
    material = Material(Eyes(), 2)
    crowd = material.crowd('fine')
    assert crowd.blank and not crowd.facts[crowd.blank].any()


def test_tiles_pages_and_pictures():
    material = Material(Eyes(), 3, COMPRESSED, Split.TEST)
    for seen, counts in (
        (material.tiles(['fine'])[0], [64]),
        (material.page(['fine', 'photo', 'shape']), [4 * 64]),  # with its thumbnail
        (material.pictures(['fine', 'photo']), [64, 64]),
    ):
        assert seen.counts == counts and seen.merged.shape == (sum(counts), 16 * 3) and seen.questions
        codes = [question.answer for question in seen.questions if question.kind == 'fine']
        assert codes and all(map(is_withheld, codes))


def test_the_same_seed_draws_the_same():
    first, again = (Material(Eyes(), 4).tiles(['fine', 'shape']) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.merged, other.merged) and one.questions == other.questions
