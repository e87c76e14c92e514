"""Clients that leave before their answer: what is left to encode of their images leaves the queue."""

import time

import numpy as np
import pytest
from parity.conversations import data_url
from PIL import Image
from serving.client import send
from serving.configurations import COMPRESSED
from waiting import HANG

IMAGES, TILES = 20, 13  # images of a request, and tiles of each, the thumbnail included
ATTEMPTS = 5  # to leave while half of the tiles are still to be encoded


pytestmark = COMPRESSED


def chat(client, urls, **extra):
    content = [{'type': 'image_url', 'image_url': {'url': url}} for url in urls]
    return '/v1/chat/completions', {'messages': [{'role': 'user', 'content': content}], **extra}


def messages(client, urls, **extra):
    sources = [{'type': 'base64', 'media_type': 'image/png', 'data': url.partition(',')[2]} for url in urls]
    content = [{'type': 'image', 'source': source} for source in sources]
    return '/v1/messages', {'messages': [{'role': 'user', 'content': content}], **extra}


def generate(client, urls, **extra):
    return '/generate', {'prompt': 'Compare.', 'image_data': urls, **extra}


REQUESTS = {
    'chat': (chat, {}),
    'chat, streamed': (chat, {'stream': True}),
    'chat, three choices': (chat, {'n': 3}),
    'chat, two choices streamed': (chat, {'n': 2, 'stream': True}),
    'messages': (messages, {}),
    'messages, streamed': (messages, {'stream': True}),
    'generate': (generate, {}),
    'generate, streamed': (generate, {'stream': True}),
}


@pytest.mark.busy
@pytest.mark.parametrize('case', REQUESTS)
def test_tiles_leave_the_queue(client, prompts, judge, case):
    said = len(client.server.log_text())
    for _ in range(ATTEMPTS):
        before = client.encoded_tiles()
        with send(client, *request(client, case, before)):
            deadline = time.monotonic() + HANG
            while client.encoded_tiles() == before:
                assert time.monotonic() < deadline, 'encoding has not begun'
        if client.encoded_tiles() - before < IMAGES * TILES // 2:
            break  # the client has left in time
    else:
        pytest.fail('half of the tiles were encoded before the client could leave')
    # The stage takes the oldest first: were they still queued, all tiles would be encoded before those of this request.
    answer = client.chat(prompts['one photograph'])
    judge().check(prompts['one photograph'], answer, 'all', name='one photograph')
    assert client.encoded_tiles() - before < IMAGES * TILES
    log = client.server.log_text()[said:]
    assert 'Traceback' not in log and 'ERROR' not in log


def request(client, case, seed):
    """The path and body of a request with images that nobody has sent before."""
    build, extra = REQUESTS[case]
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (IMAGES, 30, 40, 3), dtype=np.uint8)
    return build(client, [data_url(Image.fromarray(one)) for one in noise], model=client.model, max_tokens=4, **extra)
