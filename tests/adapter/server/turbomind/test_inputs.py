"""Visual tokens in the form in which TurboMind takes them."""

import pytest
import torch
from lmdeploy.serve.core.exceptions import RequestError

from lmdeploy_vico.adapter.server.turbomind.inputs import VisualInput
from lmdeploy_vico.stage.jobs import EncodedImage
from lmdeploy_vico.vision.projection import VisualTokens

WIDTH = 8
REMEDY = 'Something else has to be done.'


def image(*tile_tokens, dtype=torch.float32, value=None):
    shape = sum(tile_tokens), WIDTH
    rows = torch.randn(shape, dtype=dtype) if value is None else torch.full(shape, value, dtype=dtype)
    return EncodedImage(VisualTokens(rows, list(tile_tokens), [0.5] * len(tile_tokens)), [b'x'] * len(tile_tokens))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_an_image_is_one_range_whatever_its_tiles(dtype):
    images = [image(64, 256, 256), image(64)]
    visual = VisualInput.of(images, [3, 600], dtype, REMEDY)
    assert visual.ranges.dtype == torch.int32 and visual.ranges.is_contiguous()
    assert visual.ranges.tolist() == [[3, 579], [600, 664]]
    assert visual.values.dtype == dtype and visual.values.is_contiguous()
    assert visual.values.equal(torch.cat([one.tokens.embeddings for one in images]).to(dtype))
    visual.require(664, WIDTH, dtype)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_what_float16_cannot_hold_is_refused(dtype):
    images = [image(64, dtype=dtype, value=70000.0)]
    with pytest.raises(RequestError, match=f'beyond the range of float16, .* runs. {REMEDY}') as refusal:
        VisualInput.of(images, [0], torch.float16, REMEDY)
    assert refusal.value.status_code == 400
    assert VisualInput.of(images, [0], torch.bfloat16, REMEDY).values.isfinite().all()
    assert VisualInput.of([image(64, value=65000.0)], [0], torch.float16, REMEDY).values.isfinite().all()


@pytest.mark.parametrize(
    ('starts', 'tokens', 'width', 'dtype', 'problem'),
    [
        ([0, 64], 127, WIDTH, torch.bfloat16, 'they lie outside the prompt of 127 tokens'),
        ([-1, 64], 200, WIDTH, torch.bfloat16, 'they lie outside the prompt of 200 tokens'),
        ([0, 63], 200, WIDTH, torch.bfloat16, 'two images overlap, or are out of order'),
        ([100, 0], 200, WIDTH, torch.bfloat16, 'two images overlap, or are out of order'),
        ([0, 64], 200, WIDTH + 1, torch.bfloat16, 'they have 8 values each, and the engine takes 9'),
        ([0, 64], 200, WIDTH, torch.float16, 'they are torch.bfloat16, and the engine takes torch.float16'),
    ],
)
def test_what_does_not_fit_never_reaches_the_engine(starts, tokens, width, dtype, problem):
    visual = VisualInput.of([image(64), image(64)], starts, torch.bfloat16, REMEDY)
    with pytest.raises(RequestError, match=problem):
        visual.require(tokens, width, dtype)


def test_ranges_and_rows_that_differ_in_number():
    visual = VisualInput.of([image(64), image(64)], [0, 64], torch.bfloat16, REMEDY)
    with pytest.raises(RequestError, match='they are 127, and their places 128'):
        VisualInput(visual.values[:-1], visual.ranges).require(200, WIDTH, torch.bfloat16)
    with pytest.raises(RequestError, match='an image has none'):
        VisualInput(visual.values, torch.tensor([[0, 128], [128, 128]])).require(200, WIDTH, torch.bfloat16)
