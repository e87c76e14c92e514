"""The encoder on the Triton kernels, in Triton's interpreter, and proof that they are what ran."""

import numpy as np
import pytest
import torch

from lmdeploy_vico.checkpoints.files import Checkpoint
from lmdeploy_vico.choices import Speedups
from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.kernels import attention_pool, implementation, linear, pack, pixel_shuffle, residual_norm
from lmdeploy_vico.vision.tile_encoder import TileEncoder

REFERENCES = (
    (attention_pool, 'attention_pool_torch'),
    (linear, 'linear_torch'),
    (pixel_shuffle, 'pixel_shuffle_torch'),
    (pack, 'pack_torch'),
    (residual_norm, 'residual_norm_torch'),
)

pytestmark = pytest.mark.skipif(
    not implementation.INTERPRETED, reason='TRITON_INTERPRET=1 has to be set for the whole process, as make test does'
)


@pytest.fixture
def tiles(rng):
    return rng.integers(0, 256, (2, 448, 448, 3), dtype=np.uint8)  # a few: the interpreter takes 5 s for each


@pytest.fixture
def encoder(request, make_checkpoint):
    return TileEncoder.from_pretrained(make_checkpoint(), tile_batch=getattr(request, 'param', 1))


@pytest.fixture
def use():
    yield implementation.use
    implementation.use('auto')


def forbid(monkeypatch, names):
    def forbidden(*args):
        raise AssertionError('not the implementation that was chosen')

    for module, name in names:
        monkeypatch.setattr(module, name, forbidden)


@pytest.mark.slow
def test_triton_is_chosen_and_agrees_with_torch(encoder, tiles, use, monkeypatch):
    use('torch')
    expected = encoder.encode_tiles([tiles], 0.5)
    use('auto')
    forbid(monkeypatch, REFERENCES)
    monkeypatch.setattr('lmdeploy_vico.vision.projection.PROJECTED_BATCHES', 1)  # the interpreter takes its time
    encoder.warm_up()
    for ours, theirs in zip(encoder.encode_tiles([tiles], 0.5), expected, strict=True):
        assert ours.tile_tokens == theirs.tile_tokens
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)
        error = (ours.embeddings - theirs.embeddings).norm() / theirs.embeddings.norm()
        assert error <= 1e-5


def test_torch_when_asked_for(encoder, tiles, use, monkeypatch):
    use('torch')
    forbid(monkeypatch, [(module, name.replace('_torch', '_triton')) for module, name in REFERENCES])
    encoder.encode_tiles([tiles[:1]], 'all')


@pytest.mark.slow
@pytest.mark.parametrize('encoder', [2], indirect=True)
def test_alone_or_among_others(encoder, tiles, rows_apart):
    def score_and_tokens(order):
        features = encoder.features(tiles[order])
        compressed = torch.tensor([index != 1 for index in order])
        return features.scores, encoder.projection.by_tile(features.patches, compressed)

    alone = [score_and_tokens([index]) for index in range(len(tiles))]
    order = [1, 0]
    scores, tokens = score_and_tokens(order)
    for place, index in enumerate(order):
        assert torch.equal(scores[place], alone[index][0][0])
        assert torch.equal(tokens[place], alone[index][1][0])


def fast_encoder(path, vit, **more):
    """With the ViT's kernels switched on."""
    speedups = Speedups(residual_norm=True, strided_qk_norm=vit == 'rms_norm', padded_patches=True)
    return TileEncoder.load(Checkpoint(path), VicoConfig.from_pretrained(path), speedups=speedups, **more)


@pytest.fixture(params=['layer_norm', 'rms_norm'])
def model(request, make_checkpoint):
    """A ViT whose blocks are to be given a few tokens: for all of a tile the interpreter takes minutes."""
    return fast_encoder(make_checkpoint(vit=request.param), request.param).tower.vision_model


def launches(model):
    """With and without a residual: two a block, but for the last one, which no norm follows; q and k of every block."""
    blocks = len(model.encoder.layers)
    return 2 * blocks - 1, 2 * blocks if model.speedups.strided_qk_norm else 0


@pytest.fixture
def launched(monkeypatch):
    """For each launch so far, whether it added a residual."""
    run, calls = residual_norm.residual_norm_triton, []

    def recorded(x, delta, *rest):
        calls.append(delta is not None)
        return run(x, delta, *rest)

    monkeypatch.setattr(residual_norm, 'residual_norm_triton', recorded)
    return calls


@torch.inference_mode()
def test_the_vits_kernels_run_and_agree_with_its_own_modules(model, rng, launched, monkeypatch):
    forbid(monkeypatch, REFERENCES)
    width = model.embeddings.class_embedding.shape[-1]
    hidden = torch.from_numpy(rng.standard_normal((2, 5, width))).float()
    ours = model.blocks(hidden)
    assert (launched.count(True), launched.count(False)) == launches(model)
    launched.clear()
    model.speedups = Speedups()
    plain = model.blocks(hidden)
    assert launched == []
    assert (ours - plain).norm() <= 1e-6 * plain.norm()


@torch.inference_mode()
def test_the_vits_kernels_alone_or_among_others(model, rng):
    width = model.embeddings.class_embedding.shape[-1]
    tiles = torch.from_numpy(rng.standard_normal((4, 5, width))).float()
    expected = model.blocks(tiles[[0, 1, 2, 3]])[0]
    for order in ([2, 0, 1, 3], [1, 3, 2, 0], [0, 0, 0, 0]):
        assert torch.equal(model.blocks(tiles[order])[order.index(0)], expected)


@pytest.mark.parametrize('vit', ['layer_norm', 'rms_norm'])
def test_an_encoder_takes_the_vits_kernels(make_checkpoint, vit, tiles, monkeypatch):
    encoder = fast_encoder(make_checkpoint(vit=vit), vit, tile_batch=1)
    reference, calls = residual_norm.residual_norm_torch, []

    def stand_in(x, delta, *rest):  # at once, instead of the interpreter
        calls.append(delta is not None)
        return reference(x, delta, *rest)

    forbid(monkeypatch, [(residual_norm, 'residual_norm_torch')])
    monkeypatch.setattr(residual_norm, 'residual_norm_triton', stand_in)
    encoder.features(tiles[:1])
    assert (calls.count(True), calls.count(False)) == launches(encoder.tower.vision_model)
