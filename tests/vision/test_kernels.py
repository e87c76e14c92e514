"""The encoder on the Triton kernels, in Triton's interpreter, and proof that they are what ran."""

import numpy as np
import pytest
import torch

from lmdeploy_vico.kernels import attention_pool, implementation, linear, pack, pixel_shuffle
from lmdeploy_vico.vision.encoder import VisionEncoder

REFERENCES = (
    (attention_pool, 'attention_pool_torch'),
    (linear, 'linear_torch'),
    (pixel_shuffle, 'pixel_shuffle_torch'),
    (pack, 'pack_torch'),
)

pytestmark = pytest.mark.skipif(
    not implementation.INTERPRETED, reason='TRITON_INTERPRET=1 has to be set for the whole process, as make test does'
)


@pytest.fixture
def tiles(rng):
    return rng.integers(0, 256, (3, 448, 448, 3), dtype=np.uint8)


@pytest.fixture
def encoder(make_checkpoint):
    return VisionEncoder.from_pretrained(make_checkpoint(), tile_batch=2)


@pytest.fixture
def use():
    yield implementation.use
    implementation.use('auto')


def forbid(monkeypatch, names):
    def forbidden(*args):
        raise AssertionError('not the implementation that was chosen')

    for module, name in names:
        monkeypatch.setattr(module, name, forbidden)


def test_triton_is_chosen_and_agrees_with_torch(encoder, tiles, use, monkeypatch):
    use('torch')
    expected = encoder.encode_tiles([tiles[:2], tiles[2:]], 0.5)
    use('auto')
    forbid(monkeypatch, REFERENCES)
    monkeypatch.setattr('lmdeploy_vico.vision.encoder.PROJECTED_BATCHES', 1)  # the interpreter takes its time
    encoder.warm_up()
    for ours, theirs in zip(encoder.encode_tiles([tiles[:2], tiles[2:]], 0.5), expected, strict=True):
        assert ours.tile_tokens == theirs.tile_tokens
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)
        error = (ours.embeddings - theirs.embeddings).norm() / theirs.embeddings.norm()
        assert error <= 1e-5


def test_torch_when_asked_for(encoder, tiles, use, monkeypatch):
    use('torch')
    forbid(monkeypatch, [(module, name.replace('_torch', '_triton')) for module, name in REFERENCES])
    encoder.encode_tiles([tiles[:1]], 'all')


def test_alone_or_among_others(encoder, tiles, rows_apart):
    def score_and_tokens(order):
        features = encoder.features(tiles[order])
        return features.scores, encoder.project(features.patches, torch.tensor([index != 1 for index in order]))

    alone = [score_and_tokens([index]) for index in range(len(tiles))]
    order = [2, 0, 1]
    scores, tokens = score_and_tokens(order)
    for place, index in enumerate(order):
        assert torch.equal(scores[place], alone[index][0][0])
        assert torch.equal(tokens[place], alone[index][1][0])
