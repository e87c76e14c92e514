"""The requests of a measurement: what is asked, how much of it is compressed, and of which pictures and texts."""

import asyncio
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.workload.pictures import make_pictures
from lmdeploy_vico.bench.workload.requests import (
    AUTO,
    FLASH,
    IMAGE,
    INTERNVL,
    LLM,
    OURS,
    OURS_ON_TURBOMIND,
    Cell,
    Picture,
    Requests,
    cells,
    compressed_tiles,
    parse_compression,
    visual_tokens,
)
from lmdeploy_vico.bench.workload.texts import WORDS, make_texts
from lmdeploy_vico.vision.routing import round_half_up
from lmdeploy_vico.vision.tiling import Tiling, choose_grid, cut_tiles, tile_digests


@pytest.mark.parametrize('share', [0.0, 0.1, 0.25, 0.3, 0.5, 0.75])
@pytest.mark.parametrize('tiles', [1, 3, 10, 13])
def test_compression_is_met_to_the_nearest_tile_and_spread(share, tiles):
    numbers = [compressed_tiles(share, tiles, index) for index in range(500)]
    assert max(numbers) - min(numbers) <= 1
    assert 0 <= min(numbers) <= max(numbers) <= tiles
    for requests in (1, 7, 64, 500):
        assert abs(sum(numbers[:requests]) - requests * share * tiles * 4 / 3) <= 0.5 + 1e-9
        removed = 1 - sum(visual_tokens(tiles, n) for n in numbers[:requests]) / (requests * visual_tokens(tiles))
        assert abs(removed - share) * requests * tiles <= 0.375 + 1e-9  # half a tile is 3/8 of its tokens


def test_ten_tiles_as_in_the_paper():
    shares = {0.25: {3, 4}, 0.5: {6, 7}, 0.75: {10}}
    assert {s: {compressed_tiles(s, 10, i) for i in range(2000)} for s in shares} == shares
    assert visual_tokens(10) == 2560
    assert visual_tokens(10, 10) == 640


@pytest.mark.parametrize('text', ['0.76', '-0.1', 'all', 'nan', ''])
def test_compression_that_cannot_be(text):
    with pytest.raises(ValueError, match=r'0 to 0\.75, or auto'):
        parse_compression(text)


def test_cells():
    made = cells([LLM, IMAGE], [64], [0.5, AUTO], [INTERNVL, FLASH])
    assert made == [
        Cell(LLM, OURS, 64, 0.0),
        Cell(LLM, OURS, 64, 0.5),
        *(Cell(IMAGE, OURS, 64, how) for how in (0.0, 0.5, AUTO)),
        Cell(IMAGE, FLASH, 64, None),
        Cell(IMAGE, INTERNVL, 64, None),
    ]
    assert [cell for cell in made if cell.is_reference] == [made[0], made[2]]
    both = cells([LLM], [64], [0.5], [], [OURS, OURS_ON_TURBOMIND])
    assert both == [Cell(LLM, server, 64, share) for server in (OURS, OURS_ON_TURBOMIND) for share in (0.0, 0.5)]
    assert [cell.is_reference for cell in both] == [True, False] * 2


@pytest.mark.parametrize('tiles', [1, 2, 3, 5, 7, 10, 13, 40])
def test_pictures_have_the_tiles_that_are_asked_for(tiles):
    picture = Picture.of_tiles(tiles)
    grid = picture.columns * picture.rows
    assert picture.count * Tiling(1, grid).grid(picture.size).tiles == tiles
    assert choose_grid(*picture.size, 1, grid) == (picture.columns, picture.rows)


def test_no_two_pictures_share_a_tile():
    picture = Picture.of_tiles(5)
    urls = make_pictures(6, picture.size, seed=3)
    digests = []
    for url in urls:
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(',')[2])))
        assert image.size == picture.size
        digests += tile_digests(cut_tiles(image, 1, 4))
    assert len(set(digests)) == len(digests) == 30
    assert urls == make_pictures(6, picture.size, seed=3)
    assert set(urls).isdisjoint(make_pictures(6, picture.size, seed=4))


def test_pictures_are_smooth_in_parts_and_noisy_in_others():
    [url] = make_pictures(1, (1344, 1344), seed=0)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(',')[2])))).astype(int)
    steps = np.abs(np.diff(pixels[..., 0], axis=1))[:, :1342].reshape(1344, 61, 22).mean(2)
    assert steps.min() < 3 < 10 < steps.max()


class Words:
    """A tokenizer: a word of up to three letters is one token, a longer one two; a space before it is free."""

    def __init__(self, wrong_every: int = 0) -> None:
        self.wrong_every, self.texts = wrong_every, 0

    async def __call__(self, texts: list[str]) -> list[int]:
        self.texts += len(texts)
        counts = [sum(1 if len(word) <= 3 else 2 for word in text.split()) for text in texts]
        if self.wrong_every and ' ' in texts[0].strip():
            counts = [n + ((self.texts + i) % self.wrong_every == 0) for i, n in enumerate(counts)]
        return counts


@pytest.mark.parametrize('tokens', [1, 2, 64, 512])
def test_texts_have_exactly_the_tokens_asked_for(tokens):
    texts = asyncio.run(make_texts(Words(), tokens, 300, seed=1))
    assert asyncio.run(Words()(texts)) == [tokens] * 300
    assert texts == asyncio.run(make_texts(Words(), tokens, 300, seed=1))
    if tokens >= 64:
        assert len(set(texts)) == 300


def test_texts_that_came_out_wrong_are_made_again():
    encode = Words(wrong_every=10)
    texts = asyncio.run(make_texts(encode, 64, 50, seed=1))
    assert len(texts) == 50
    assert encode.texts == 2 * len(WORDS) + 50 + 5


def test_a_length_that_no_text_has():
    async def encode(texts):
        return [2 * len(text.split()) for text in texts]

    with pytest.raises(BenchError, match='exactly 5 tokens'):
        asyncio.run(make_texts(encode, 5, 3, seed=0))


@pytest.fixture
def requests():
    texts = {64: [f'text {i}' for i in range(20)]}
    return Requests('model', 10, ['first', 'second', 'third'], texts, seed=2)


def test_bodies_in_image_mode(requests):
    body = json.loads(requests.body(Cell(IMAGE, OURS, 64, 0.25), 1, start=3))
    image, text = body['messages'][0]['content']
    assert image['image_url'] == {'url': 'second', 'max_dynamic_patch': 9}
    assert text == {'type': 'text', 'text': 'text 1'}
    assert (body['max_tokens'], body['stream'], body['model']) == (1, True, 'model')
    fraction = body['mm_processor_kwargs']['image']['compression']
    assert round_half_up(fraction, 10) == compressed_tiles(0.25, 10, 1)  # as the server reads it
    assert json.loads(requests.body(Cell(IMAGE, OURS, 64, AUTO), 0))['mm_processor_kwargs'] == {
        'image': {'compression': 'auto'}
    }
    assert 'mm_processor_kwargs' not in json.loads(requests.body(Cell(IMAGE, FLASH, 64, None), 0))


def test_fractions_mean_the_tiles_they_are_made_of():
    for tiles in range(1, 120):
        assert [round_half_up(k / tiles, tiles) for k in range(tiles + 1)] == list(range(tiles + 1))


def test_bodies_in_llm_mode(requests):
    bodies = [json.loads(requests.body(Cell(LLM, OURS, 64, 0.75), i)) for i in range(20)]
    items = [body['messages'][0]['content'][0]['image_url'] for body in bodies]
    assert {(item['synthetic']['tiles'], item['synthetic']['compressed']) for item in items} == {(10, 10)}
    assert len({item['synthetic']['seed'] for item in items}) == 20
    assert Image.open(io.BytesIO(base64.b64decode(items[0]['url'].partition(',')[2]))).size == (1, 1)
    assert 'mm_processor_kwargs' not in bodies[0]


def test_two_tiles_are_two_pictures():
    requests = Requests('model', 2, ['a', 'b', 'c', 'd'], {64: ['text']})
    content = json.loads(requests.body(Cell(IMAGE, OURS, 64, 0.0), 0, start=1))['messages'][0]['content']
    assert [item['image_url']['url'] for item in content[:2]] == ['c', 'd']
