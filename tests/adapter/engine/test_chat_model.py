"""Where visual tokens land in a continuous batch, with each implementation of the packing."""

from types import SimpleNamespace

import pytest
import torch
from lmdeploy.pytorch.multimodal.data_type import MultiModalData
from torch import nn

from lmdeploy_vico.adapter.engine.chat_model import MODALITY, VisualTokensMixin
from lmdeploy_vico.kernels import implementation, pack

WIDTH = 24
LENGTHS, HISTORY = [40, 7, 90], [0, 64, 128]  # tokens of three sequences in this step, and of earlier chunks


class Model(VisualTokensMixin):
    """What the mixin needs of a language model, without LMDeploy's."""

    def __init__(self):
        torch.manual_seed(1)
        self.embedding = nn.Embedding(50, WIDTH).bfloat16().requires_grad_(False)

    def get_input_embeddings(self):
        return self.embedding


@pytest.fixture(params=['torch', 'triton'])
def packing(request, monkeypatch):
    if request.param == 'triton' and not implementation.INTERPRETED:
        pytest.skip('TRITON_INTERPRET=1 has to be set for the whole process, as make test does')

    def unreachable(*args):
        raise AssertionError('not the implementation that was chosen')

    other = {'torch': 'pack_triton', 'triton': 'pack_torch'}[request.param]
    monkeypatch.setattr(pack, other, unreachable)
    implementation.use(request.param)
    yield
    implementation.use('auto')


def spans(*places):
    """Random embeddings for spans at these positions of their sequence."""
    return [
        MultiModalData(data=torch.randn(end - start, WIDTH).bfloat16(), start=start, end=end) for start, end in places
    ]


def context_of(multimodals):
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)[:-1]
    return SimpleNamespace(
        input_ids=torch.arange(sum(LENGTHS))[None] % 50,
        input_multimodals=multimodals,
        q_start_loc=starts,
        vision_inputs=SimpleNamespace(history_lengths=torch.tensor(HISTORY)),
    )


def test_visual_tokens_land_at_their_positions(packing):
    model = Model()
    sequences = [spans((3, 20), (20, 39)), [], spans((130, 194), (195, 196))]
    context = context_of([{MODALITY: of} if of else {} for of in sequences])
    expected = model.embedding(context.input_ids).clone()
    for start, history, of in zip(context.q_start_loc.tolist(), HISTORY, sequences, strict=True):
        for span in of:
            expected[0, start + span.start - history : start + span.end - history] = span.data
    assert torch.equal(model._embed_with_visual_tokens(context), expected)


@pytest.mark.parametrize('multimodals', [None, [], [{}, {}, {}], [{MODALITY: []}, {}, {}]])
def test_without_visual_tokens_ids_are_left_to_the_language_model(multimodals):
    assert Model()._embed_with_visual_tokens(context_of(multimodals)) is None
