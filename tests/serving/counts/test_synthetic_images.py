"""Requests for made-up visual tokens, for measuring the language model alone."""

import urllib.request

import openai
import pytest
from serving.configurations import CACHING

PIXEL = (
    'data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC'
)


pytestmark = CACHING


def ask(client, *images):
    items = [{'type': 'image_url', 'image_url': {'url': PIXEL, **image}} for image in images]
    return client.openai.chat.completions.create(
        model=client.model,
        messages=[{'role': 'user', 'content': [*items, {'type': 'text', 'text': 'What is it?'}]}],
        max_tokens=2,
        temperature=0,
    ).usage


def synthetic(tiles, compressed, seed):
    return {'synthetic': {'tiles': tiles, 'compressed': compressed, 'seed': seed}}


def routed_tiles(client):
    """How many tiles have been given to the language model, whatever their resolution."""
    with urllib.request.urlopen(f'{client.server.url}/metrics') as metrics:
        lines = metrics.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith('vico:tiles_total{'))


def test_tokens_are_counted_and_cached_by_seed(client):
    text = ask(client, synthetic(1, 1, 0)).prompt_tokens - 64
    before = client.encoded_tiles(), routed_tiles(client)
    usages = [ask(client, synthetic(6, 3, seed)) for seed in (1, 1, 2)]
    visual = 3 * 64 + 3 * 256
    for usage in usages:
        assert usage.prompt_tokens == text + visual
        assert usage.prompt_tokens_details.to_dict()['image_tokens'] == visual
    first, again, other = (usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert again > visual // 2 and max(first, other) < 64
    several = ask(client, synthetic(2, 0, 3), synthetic(1, 1, 4))
    assert several.prompt_tokens_details.to_dict()['image_tokens'] == 2 * 256 + 64
    assert (client.encoded_tiles(), routed_tiles(client)) == before
    assert ask(client, {}).prompt_tokens == text + 256  # a real image, of one tile


@pytest.mark.parametrize(
    'images, message',
    [
        ([synthetic(0, 0, 0)], 'tiles must be an integer from 1 to 41, not 0'),
        ([{'synthetic': {'tiles': 3}}], 'must be an object with the keys tiles, compressed, seed'),
        ([synthetic(1, 0, 0), {}], 'either images with "synthetic" or without, not both'),
    ],
)
def test_mistakes(client, images, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, *images)
