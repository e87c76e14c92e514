"""What the stand-in keeps of a distribution, and its log probabilities, against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from turbomind.sampling import COLUMNS, DomainError, Kept, keep, log_probabilities

PROBABILITIES = {3: 0.5, 0: 0.25, 4: 0.125, 1: 0.0625, 2: 0.0625}  # by token id


def config(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    return SimpleNamespace(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


LOGITS = torch.tensor([math.log(PROBABILITIES[token]) for token in range(5)]) + 3  # a constant does not matter


@pytest.mark.parametrize(
    ('asked', 'expected'),
    [
        ({}, PROBABILITIES),
        ({'top_k': 1}, {3: 1.0}),
        ({'top_k': 2}, {3: 2 / 3, 0: 1 / 3}),
        ({'top_k': 1024}, PROBABILITIES),
        ({'top_p': 0.0}, {3: 1.0}),
        ({'top_p': 0.6}, {3: 2 / 3, 0: 1 / 3}),
        ({'top_k': 2, 'top_p': 0.7}, {3: 2 / 3, 0: 1 / 3}),
        ({'top_k': 2, 'top_p': 0.6}, {3: 1.0}),  # of what top_k left, the first is more than 0.6
        ({'min_p': 0.3}, {3: 2 / 3, 0: 1 / 3}),
        ({'min_p': 1.0}, {3: 1.0}),
        ({'temperature': 0.5, 'top_k': 2}, {3: 0.8, 0: 0.2}),
    ],
    ids=str,
)
def test_kept_tokens(asked, expected):
    kept = keep(LOGITS, config(**asked))
    assert kept.ids.tolist() == list(expected)
    assert kept.probabilities.tolist() == pytest.approx(list(expected.values()))
    values, ids = log_probabilities(kept, 0)
    assert ids.tolist() == list(expected)
    assert values.tolist() == pytest.approx([math.log(value) for value in expected.values()])


@pytest.mark.parametrize('top_k', [1025, 2**20, -1])
def test_the_kernel_throws(top_k):
    with pytest.raises(DomainError, match='top-k kernel supports 1<=k<=1024'):
        keep(torch.zeros(2**12), config(top_k=top_k))


def test_a_chosen_token_beyond_the_columns_takes_the_last():
    kept = Kept(torch.full((2000,), 1 / 2000), torch.arange(2000).flip(0))
    assert log_probabilities(kept, 1023)[1].tolist() == kept.ids[:COLUMNS].tolist()
    values, ids = log_probabilities(kept, 1500)
    assert ids.tolist() == [*kept.ids[: COLUMNS - 1].tolist(), int(kept.ids[1500])]
    assert values.isfinite().all()
