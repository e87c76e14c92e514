"""Sixteen clients at once with random pictures: every answer is the reference's."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from parity.conversations import Message
from PIL import Image
from serving.configurations import DEFAULT

CLIENTS, REQUESTS = 16, 2  # requests one after the other of each client
SHARED = 4  # pictures that several clients send
MAX_TILES = 6  # and a thumbnail
HITS, SAVED = 'vico:embedding_cache_hits_total', 'vico:visual_tokens_saved_total'


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


@DEFAULT
def test_every_answer_is_right(client, judge):
    rng = np.random.default_rng(16)
    shared = [random_picture(rng) for _ in range(SHARED)]
    asked = {
        number: {f'{number}, {turn}': random_conversation(rng, shared, f'{number}, {turn}') for turn in range(REQUESTS)}
        for number in range(CLIENTS)
    }
    hits, saved = (client.metric(name) for name in (HITS, SAVED))

    def run(number):
        return {name: client.chat(messages) for name, messages in asked[number].items()}

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(run, asked))
    assert client.metric(HITS) > hits
    assert client.metric(SAVED) > saved
    for conversations, answered in zip(asked.values(), answers, strict=True):
        for name, messages in conversations.items():
            judge().check(messages, answered[name], name=name)
