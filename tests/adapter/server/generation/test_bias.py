"""``logit_bias``, from a request's JSON to the logits in another process."""

import math
import pickle

import pytest
import torch

from lmdeploy_vico.adapter.server.generation.bias import MOST, LogitBias
from lmdeploy_vico.adapter.server.generation.errors import ParameterError


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_adds_to_the_logits_of_its_tokens_after_a_journey(dtype):
    bias = pickle.loads(pickle.dumps(LogitBias.parse({'3': 100, 5: -2.5, '0': 0})))
    logits = torch.arange(8, dtype=dtype)
    before = logits.clone()
    changed = bias(torch.tensor([1, 2]), logits)
    assert changed.dtype == dtype
    assert changed.tolist() == [0, 1, 2, 103, 4, 2.5, 6, 7]
    assert torch.equal(logits, before)


def test_values_beyond_the_limits_are_clamped():
    assert LogitBias.parse({'1': 1e9, '2': -math.inf}).values == (100.0, -100.0)


def test_nothing_to_add():
    logits = torch.randn(4)
    assert torch.equal(LogitBias.parse({})(torch.tensor([]), logits), logits)


@pytest.mark.parametrize(
    'bias, message',
    [
        ({'a': 1}, "The keys of logit_bias must be token ids, not 'a'."),
        ({'1.5': 1}, "The keys of logit_bias must be token ids, not '1.5'."),
        ({None: 1}, 'The keys of logit_bias must be token ids, not None.'),
        ({'1': math.nan}, 'The values of logit_bias must be numbers from -100 to 100, not nan.'),
        ({'1': 'x'}, "The values of logit_bias must be numbers from -100 to 100, not 'x'."),
        ({str(token): 1 for token in range(MOST + 1)}, 'logit_bias must have at most 1024 tokens, not 1025.'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused(bias, message):
    with pytest.raises(ParameterError) as error:
        LogitBias.parse(bias)
    assert str(error.value) == message
