"""Sixteen clients at once with random pictures: every answer is the reference's."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from parity.conversations import Message
from PIL import Image
from serving.conftest import Client

CLIENTS, REQUESTS = 16, 4  # requests one after the other of each client
SHARED = 4  # pictures that several clients send
MAX_TILES = 6  # and a thumbnail


def random_picture(rng: np.random.Generator) -> Image.Image:
    """From smooth to noisy, so that some tiles are compressed; any aspect ratio that fits the tiles."""
    width, height = (int(side) for side in rng.integers(40, 700, 2))
    detail = int(2 ** rng.uniform(1, 7))
    pixels = rng.integers(0, 256, (detail, detail, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def random_conversation(rng: np.random.Generator, shared: list[Image.Image], name: str) -> list[Message]:
    """One or two pictures, some of them shared, or, every fourth time, text only."""
    text = {'type': 'text', 'text': f'This is {name}.'}
    if rng.random() < 0.25:
        return [{'role': 'user', 'content': text['text']}]
    pictures = [
        shared[rng.integers(SHARED)] if rng.random() < 0.3 else random_picture(rng)
        for _ in range(rng.choice([1, 1, 2]))
    ]
    images = [{'type': 'image_url', 'image_url': {'url': one, 'max_dynamic_patch': MAX_TILES}} for one in pictures]
    return [{'role': 'user', 'content': [*images, text]}]


def test_every_answer_is_right(serve, make_checkpoint, judge):
    rng = np.random.default_rng(16)
    shared = [random_picture(rng) for _ in range(SHARED)]
    asked = {
        client: {f'{client}, {turn}': random_conversation(rng, shared, f'{client}, {turn}') for turn in range(REQUESTS)}
        for client in range(CLIENTS)
    }
    server = Client(serve(make_checkpoint()))

    def run(client):
        return {name: server.chat(messages) for name, messages in asked[client].items()}

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(run, asked))
    assert server.metric('vico:embedding_cache_hits_total') > 0
    assert server.metric('vico:visual_tokens_saved_total') > 0
    for conversations, answered in zip(asked.values(), answers, strict=True):
        for name, messages in conversations.items():
            judge().check(messages, answered[name], name=name)
