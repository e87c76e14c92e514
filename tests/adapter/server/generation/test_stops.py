"""Stop words stop at the tokens that LMDeploy finds, in less time."""

import random

import pytest
from lmdeploy.tokenizer import Tokenizer

from lmdeploy_vico.adapter.server.generation.stops import stop_token_finder


@pytest.fixture(scope='module')
def tokenizer(make_checkpoint):
    return Tokenizer(str(make_checkpoint())).model


def test_the_tokens_are_those_that_lmdeploy_finds(tokenizer):
    find = stop_token_finder(tokenizer)
    source = random.Random(3)
    names = tokenizer.model.convert_ids_to_tokens(list(range(tokenizer.vocab_size)))
    words = [*'aex.,\n!猫', '<|im_end|>', '</think>', '\n\n', 'the', ' the', 'É', '�', 'no such word']
    words += [name.replace('Ġ', ' ') for name in source.sample(names, 60) if name != 'Ġ']
    for word in words:
        assert find(word) == tokenizer.indexes_containing_token(word), word
    assert any(len(find(word)) > 1 for word in words) and any(not find(word) for word in words)


def test_a_space_stops_at_the_space(tokenizer):
    """LMDeploy looks for another character, which byte-level vocabularies do not have."""
    assert stop_token_finder(tokenizer)(' ') == tokenizer.encode(' ', False) != tokenizer.indexes_containing_token(' ')


def test_no_token_is_decoded_and_a_word_is_looked_up_once(tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(tokenizer, 'decode', calls.append)
    find = stop_token_finder(tokenizer)
    first = find('a')
    first.append(5)  # LMDeploy adds to the list that it gets
    monkeypatch.setattr(type(tokenizer.model), 'convert_ids_to_tokens', calls.append)
    assert find('a') == first[:-1]
    assert not calls
