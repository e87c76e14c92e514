"""Visual tokens reach the engine's process unchanged, at the cost of their bytes."""

import pickle

import pytest
import torch

from lmdeploy_vico.adapter.chat_model import MODALITY, SpanProcessor
from lmdeploy_vico.adapter.handover import PackedEmbeddings, PackedRows

pytestmark = pytest.mark.filterwarnings('error')

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CUTS = [(0, 5), (5, 69), (69, 100)]


def embeddings(dtype=torch.bfloat16):
    return torch.randn(100, 24, generator=torch.Generator().manual_seed(3)).to(dtype)


def spans(image):
    packed = PackedEmbeddings.of(image)
    return [
        {'embeddings': PackedRows(packed, low, high), 'start': low, 'end': high, 'content_hash': str(low)}
        for low, high in CUTS
    ]


def sent(spans):
    return pickle.loads(pickle.dumps(spans))


@pytest.mark.parametrize('transfer', [sent, list], ids=['pickled', 'in process'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_round_trip(dtype, transfer):
    image = embeddings(dtype)
    for (low, high), span in zip(CUTS, transfer(spans(image)), strict=True):
        tensor = span['embeddings'].tensor()
        assert tensor.dtype == dtype and torch.equal(tensor, image[low:high])


@pytest.mark.parametrize(
    'image',
    [embeddings().T.contiguous().T, embeddings().repeat(2, 2)[::2, 24:], embeddings().requires_grad_()],
    ids=['transposed', 'strided', 'with gradient'],
)
def test_any_strides(image):
    [*_, last] = sent(spans(image))
    assert torch.equal(last['embeddings'].tensor(), image.detach()[69:100])


def test_bit_patterns_survive():
    image = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(256, 256)  # NaNs among them
    rows = sent([PackedRows(PackedEmbeddings.of(image), 0, 256)])[0].tensor()
    assert torch.equal(rows.view(torch.int16), image.view(torch.int16))


def test_an_image_is_pickled_once():
    image = embeddings()
    assert image.nbytes < len(pickle.dumps(spans(image))) < image.nbytes + 1000


def test_tensors_have_memory_of_their_own():
    received = sent(spans(embeddings()))
    first, second = (span['embeddings'].tensor() for span in received[:2])
    before = second.clone()
    first.zero_()
    assert torch.equal(second, before) and torch.equal(received[0]['embeddings'].tensor(), embeddings()[:5])
    assert second.untyped_storage().nbytes() == second.nbytes


def test_the_engine_makes_tensors_of_them():
    image = embeddings()
    result = SpanProcessor().preprocess_input([1] * 100, sent(spans(image)))
    made = result.input_multimodals[MODALITY]
    assert torch.equal(torch.cat([span.data for span in made]), image)
    assert [(span.start, span.end, span.content_hash) for span in made] == [(low, high, str(low)) for low, high in CUTS]
