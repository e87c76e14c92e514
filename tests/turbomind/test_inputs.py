"""The stand-in refuses each prompt that TurboMind would refuse, or serve wrongly without a word."""

import pytest
import torch
from turbomind.inputs import InvalidError, embedded

VOCABULARY, WIDTH, LENGTH = 16, 8, 10


def prompt(**changed):
    """A right prompt of ten tokens, six of them visual ones of two images, but for what is changed."""
    right = {
        'input_ids': torch.arange(LENGTH, dtype=torch.int32),
        'input_embeddings': torch.randn(6, WIDTH, dtype=torch.bfloat16),
        'input_embedding_ranges': torch.tensor([[1, 5], [5, 7]], dtype=torch.int32),
    }
    return right | changed


def ranges(*pairs, dtype=torch.int32):
    return {'input_embedding_ranges': torch.tensor(pairs, dtype=dtype)}


@pytest.fixture(scope='module')
def embed():
    return torch.nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)


@pytest.mark.parametrize('right', [{}, {'input_embeddings': torch.zeros(5, WIDTH).bfloat16(), **ranges([0, 5])}])
def test_rows_go_where_their_ranges_say(embed, right):
    inputs = prompt(**right)
    expected, rows = embed(inputs['input_ids']), inputs['input_embeddings'].float()
    for begin, end in inputs['input_embedding_ranges'].tolist():
        expected[begin:end], rows = rows[: end - begin], rows[end - begin :]
    assert embedded(inputs, None, embed, torch.bfloat16).equal(expected)


def test_a_text(embed):
    ids = torch.arange(LENGTH, dtype=torch.int32)
    assert embedded({'input_ids': ids}, None, embed, torch.bfloat16).equal(embed(ids))


INVALID = {
    'ids of int64': ({'input_ids': torch.arange(LENGTH)}, 'no list of int32'),
    'ids in two dimensions': ({'input_ids': torch.zeros(1, LENGTH, dtype=torch.int32)}, 'no list of int32'),
    'no ids': ({'input_ids': torch.zeros(0, dtype=torch.int32)}, 'no list of int32'),
    'id beyond the vocabulary': ({'input_ids': torch.full((LENGTH,), VOCABULARY).int()}, 'outside the vocabulary'),
    'negative id': ({'input_ids': torch.full((LENGTH,), -1).int()}, 'outside the vocabulary'),
    'unknown input': ({'mrope_position': torch.zeros(1)}, r"unknown inputs .*'mrope_position'"),
    'wrong width': ({'input_embeddings': torch.zeros(6, WIDTH + 1).bfloat16()}, 'have 9 values, not 8'),
    'wrong dtype': ({'input_embeddings': torch.zeros(6, WIDTH).half()}, 'are torch.float16 in an engine of'),
    'float32': ({'input_embeddings': torch.zeros(6, WIDTH)}, 'are torch.float32 in an engine of'),
    'list of rows': ({'input_embeddings': torch.zeros(6 * WIDTH).bfloat16()}, 'not one matrix, row after row'),
    'column after column': ({'input_embeddings': torch.zeros(WIDTH, 6).bfloat16().T}, 'not one matrix, row after row'),
    'infinite': ({'input_embeddings': torch.full((6, WIDTH), torch.inf).bfloat16()}, 'is not finite'),
    'no number': ({'input_embeddings': torch.full((6, WIDTH), torch.nan).bfloat16()}, 'is not finite'),
    'too few rows': ({'input_embeddings': torch.zeros(5, WIDTH).bfloat16()}, 'fewer embeddings than'),
    'too many rows': ({'input_embeddings': torch.zeros(7, WIDTH).bfloat16()}, 'more embeddings than'),
    'no rows': ({'input_embeddings': torch.zeros(0, WIDTH).bfloat16()}, 'fewer embeddings than'),
    'ranges of int64': (ranges([1, 5], [5, 7], dtype=torch.int64), 'ranges are not int32'),
    'flat ranges': ({'input_embedding_ranges': torch.tensor([1, 7]).int()}, 'ranges are not int32'),
    'ranges of three': (ranges([1, 5, 0], [5, 7, 0]), 'ranges are not int32'),
    'unsorted': (ranges([5, 7], [1, 5]), 'ranges are not sorted'),
    'overlapping': (ranges([1, 5], [4, 6]), 'ranges are not sorted'),
    'negative': (ranges([-1, 3], [5, 7]), 'ranges are not sorted'),
    'beyond the prompt': (ranges([1, 5], [9, 11]), 'empty or outside the prompt'),
    'empty': (ranges([1, 7], [7, 7]), 'empty or outside the prompt'),
    'backwards': (ranges([1, 7], [8, 7]), 'empty or outside the prompt'),
}


@pytest.mark.parametrize('changed, problem', INVALID.values(), ids=INVALID.keys())
def test_invalid(embed, changed, problem):
    with pytest.raises(InvalidError, match=problem):
        embedded(prompt(**changed), None, embed, torch.bfloat16)


@pytest.mark.parametrize('missing', ['input_embeddings', 'input_embedding_ranges'])
def test_embeddings_and_ranges_come_together(embed, missing):
    inputs = prompt()
    del inputs[missing]
    with pytest.raises(InvalidError, match='come together'):
        embedded(inputs, None, embed, torch.bfloat16)


def test_pictures_for_turbominds_own_vision_model(embed):
    with pytest.raises(InvalidError, match='there is multimodal input'):
        embedded(prompt(), {'pixel_values': 1}, embed, torch.bfloat16)
