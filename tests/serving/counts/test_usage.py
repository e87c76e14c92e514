"""What ``usage.prompt_tokens_details`` says of images, whichever way an answer is sent."""

import pytest
from parity.conversations import on_the_wire
from parity.prompts import Picture, chat_segments
from PIL import Image
from serving.configurations import CACHING

NAMES = ('one photograph', 'images in the history', 'a compression of its own', 'the image token typed', 'text only')


pytestmark = CACHING


@pytest.fixture(scope='module')
def tile_tokens(prompts, judge):
    """``tile_tokens(name)``: 64 or 256 for each tile of the prompt, as the reference routes them."""

    def count(name):
        segments = chat_segments(prompts[name])
        pictures = [Picture(s) if isinstance(s, Image.Image) else s for s in segments if not isinstance(s, str)]
        encoded = judge().reference.encode(
            [p.image for p in pictures],
            per_image=[p.compression for p in pictures],
            max_tiles=[p.max_tiles for p in pictures],
        )
        return [count for one in encoded for count in one.tile_tokens]

    return count


@pytest.mark.parametrize('name', NAMES)
def test_image_tokens(client, prompts, tile_tokens, name):
    options = {'model': client.model, 'messages': on_the_wire(prompts[name]), 'max_tokens': 3, 'temperature': 0}
    create = client.openai.chat.completions.create
    tiles = tile_tokens(name)
    expected = sum(tiles)
    assert (expected == 0) == (name == 'text only')
    for n in (1, 2):
        usages = [create(**options, n=n).usage]
        stream = create(**options, n=n, stream=True, stream_options={'include_usage': True})
        usages += [chunk.usage for chunk in stream if chunk.usage]
        assert len(usages) == 2
        for usage in usages:
            details = usage.prompt_tokens_details.to_dict()
            assert details['image_tokens'] == expected
            assert (details['image_tiles'], details['compressed_tiles']) == (len(tiles), tiles.count(64))
            assert details['image_tokens_saved'] == 192 * tiles.count(64)
            assert 0 <= expected < usage.prompt_tokens
    assert expected == 0 or details['cached_tokens'] > 0  # the second time, and counted beside
