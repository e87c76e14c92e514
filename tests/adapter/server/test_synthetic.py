"""Image items whose visual tokens are made up: what a client may ask for, and what it gets."""

from dataclasses import replace

import pytest
import torch

from lmdeploy_vico.adapter.server.items import ImageItem, Rules, SyntheticItem
from lmdeploy_vico.adapter.server.prompt import assemble
from lmdeploy_vico.adapter.server.request import parse_request
from lmdeploy_vico.adapter.server.synthetic import MAX_SEED, STARTS, SyntheticEncoder, SyntheticImage
from lmdeploy_vico.vision.tiling import Tiling

WIDTH = 32
REAL = {'type': 'image_url', 'image_url': {'url': 'x'}}


def parsed(*items, synthetic=True):
    rules = Rules(Tiling(1, 12), max_tiles=12, synthetic=synthetic)
    return parse_request([{'role': 'user', 'content': list(items)}], None, None, rules)


def item(wanted, **params):
    return {'type': 'image_url', 'image_url': {'url': 'x', 'synthetic': wanted, **params}}


def jobs(wanted, synthetic=True, **params):
    [media] = parsed(item(wanted, **params), synthetic=synthetic).media
    return media.jobs(None, 0)


def image(tiles, compressed, seed):
    return SyntheticImage(tiles=tiles, compressed=compressed, seed=seed)


def wanted(tiles=10, compressed=5, seed=7, **others):
    return {'tiles': tiles, 'compressed': compressed, 'seed': seed, **others}


def test_what_is_asked_for():
    assert jobs(wanted()) == [image(10, 5, 7)]
    assert jobs({'tiles': 10, 'seed': 7}) == [replace(image(10, 0, 7), stated=False)]
    assert jobs(wanted(13, 13, MAX_SEED)) == [image(13, 13, MAX_SEED)]  # 12 tiles and a thumbnail


def test_unknown_key_where_the_option_is_off():
    with pytest.raises(ValueError, match="'synthetic' is not a key of an image item"):
        jobs(wanted(), synthetic=False)


@pytest.mark.parametrize('value', [3, [], {}, {'tiles': 3}, wanted(extra=1)])
def test_other_objects(value):
    with pytest.raises(ValueError, match='"synthetic" must be an object with the keys tiles, compressed, seed, not '):
        jobs(value)


@pytest.mark.parametrize(
    'value, message',
    [
        (wanted(tiles=0), 'tiles must be an integer from 1 to 13, not 0'),
        (wanted(tiles=14), 'tiles must be an integer from 1 to 13, not 14'),
        (wanted(tiles=True), 'tiles must be an integer from 1 to 13, not True'),
        (wanted(tiles=2.0), 'tiles must be an integer from 1 to 13, not 2.0'),
        (wanted(compressed=11), 'compressed must be an integer from 0 to 10, not 11'),
        (wanted(compressed=-1), 'compressed must be an integer from 0 to 10, not -1'),
        (wanted(seed='7'), "seed must be an integer from 0 to 9223372036854775807, not '7'"),
        (wanted(seed=-1), 'seed must be an integer from 0'),
    ],
)
def test_bad_values(value, message):
    with pytest.raises(ValueError, match=message):
        jobs(value)


def test_other_keys_of_the_item():
    with pytest.raises(ValueError, match='An image item with "synthetic" has no key \'compression\''):
        jobs(wanted(), compression='all')


def test_real_images_beside_synthetic_ones():
    assert [type(media) for media in parsed(REAL, REAL).media] == [ImageItem] * 2
    assert [type(media) for media in parsed(item(wanted()), item(wanted())).media] == [SyntheticItem] * 2
    with pytest.raises(ValueError, match='either images with "synthetic" or without, not both'):
        parsed(item(wanted()), REAL)


@pytest.fixture(scope='module')
def encoder():
    return SyntheticEncoder(WIDTH, torch.bfloat16, max_tiles=13)


@pytest.mark.parametrize('tiles, compressed', [(10, 0), (10, 5), (10, 10), (13, 0), (1, 1)])
def test_number_of_tokens(encoder, tiles, compressed):
    tokens = encoder.encode(image(tiles, compressed, 3)).tokens
    assert tokens.embeddings.shape == (64 * compressed + 256 * (tiles - compressed), WIDTH)
    assert tokens.embeddings.dtype == torch.bfloat16
    assert sorted(tokens.tile_tokens) == [64] * compressed + [256] * (tiles - compressed)
    assert tokens.embeddings.float().std() == pytest.approx(WIDTH**-0.5, rel=0.05)


def test_largest_image_fits_wherever_its_seed_starts(encoder):
    for seed in range(3 * STARTS):
        assert len(encoder.encode(image(13, 0, seed)).tokens.embeddings) == 13 * 256


def test_seeds_make_the_content(encoder):
    first, again, other = (encoder.submit([image(4, 1, seed)]).result()[0] for seed in (1, 1, 2))
    assert torch.equal(first.tokens.embeddings, again.tokens.embeddings)
    assert torch.equal(
        first.tokens.embeddings, SyntheticEncoder(WIDTH, torch.bfloat16, 13).encode(image(4, 1, 1)).tokens.embeddings
    )
    assert not torch.equal(first.tokens.embeddings, other.tokens.embeddings)

    def hashes(one):
        return [span.content_hash for span in assemble([[1], [2]], [one], 9, 64)[1]]

    assert hashes(first) == hashes(again)
    assert not set(hashes(first)) & set(hashes(other))
    assert len(set(hashes(first))) == len(hashes(first))
    # Of another composition, the rows start elsewhere: no part may be taken for one of the first.
    assert not set(hashes(first)) & set(hashes(encoder.encode(image(4, 2, 1))))
