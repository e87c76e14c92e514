"""VisionEncoder: the contract."""

import pytest
import torch

from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import Tiling, cut_grid


@pytest.fixture(scope='module', params=['layer_norm', 'rms_norm'])
def path(request, make_checkpoint):
    return make_checkpoint(vit=request.param)


@pytest.fixture(scope='module')
def encoder(path):
    return VisionEncoder.from_pretrained(path)


def test_one_result_per_image(encoder, pictures):
    images = [pictures['coffee'], pictures['astronaut'], pictures['page']]
    results = encoder.encode(images)
    assert len(results) == 3
    for image, result in zip(images, results, strict=True):
        assert len(result.tile_tokens) == len(result.scores) == Tiling.of(encoder.config).grid(image.size).tiles
        assert set(result.tile_tokens) <= {64, 256}
        assert result.embeddings.shape == (sum(result.tile_tokens), encoder.config.llm_hidden_size)
        assert all(0 <= score <= 1 for score in result.scores)


def test_no_images(encoder):
    assert encoder.encode([]) == []


@pytest.mark.parametrize('compression, tokens', [('none', {256}), ('all', {64}), (0.0, {256}), (1.0, {64})])
def test_compression_of_everything_or_nothing(encoder, pictures, compression, tokens):
    [result] = encoder.encode([pictures['coffee']], compression)
    assert set(result.tile_tokens) == tokens


def test_fraction_takes_the_highest_scores(encoder, pictures):
    [result] = encoder.encode([pictures['coffee']], 0.3)
    compressed = [score for score, n in zip(result.scores, result.tile_tokens, strict=True) if n == 64]
    assert sorted(compressed) == sorted(result.scores)[-2:]  # 0.3 * 7 tiles, rounded


def test_unknown_compression(encoder, pictures):
    with pytest.raises(ValueError, match='must be "auto"'):
        encoder.encode([pictures['astronaut']], 'half')


def test_images_are_cut_encoded_and_routed_together(encoder, path, pictures):
    images = [pictures['coffee'], pictures['page']]
    tiles = [cut_grid(image, Tiling.of(encoder.config).grid(image.size)) for image in images]
    expected = TileEncoder.from_pretrained(path).encode_tiles(tiles, 0.5)
    for ours, theirs in zip(encoder.encode(images, 0.5), expected, strict=True):
        assert torch.equal(ours.embeddings, theirs.embeddings)
        assert (ours.tile_tokens, ours.scores) == (theirs.tile_tokens, theirs.scores)


def test_computes_in_float32_on_a_cpu(path, pictures):
    encoder = VisionEncoder.from_pretrained(path, device='cpu', dtype=torch.bfloat16)
    [result] = encoder.encode([pictures['astronaut']])
    assert result.embeddings.dtype == torch.float32
