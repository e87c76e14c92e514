"""Hostile JSON bodies, the same for the same seed: a good chat request in which one key has a value nobody expects."""

import json
import random
from collections.abc import Iterator
from typing import Any

KEYS = (
    'messages', 'max_tokens', 'temperature', 'top_p', 'top_k', 'min_p', 'n', 'stop', 'seed', 'logprobs', 'top_logprobs',
    'logit_bias', 'repetition_penalty', 'response_format', 'tools', 'tool_choice', 'stream_options', 'bad_words',
    'compression', 'max_dynamic_patch', 'uuid', 'cache_salt', 'mm_processor_kwargs', 'media_io_kwargs',
    'migration_request', 'preserve_cache', 'with_cache', 'session_id', 'chat_template_kwargs', 'input_ids',
)  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, float('nan'), float('inf'), '', '\x00', '\ud800',
    'x' * 100_000, [], [None], [[]], {}, {'': None}, {'\udfff': '\ud800'}, {'image': {'max_dynamic_patch': 2**63}},
    {'image': []}, {'video': {'num_frames': -1}}, _nested(100), _nested(800), [{'role': 'user'}],
    [{'role': '\ud800', 'content': [{'type': 'image_url', 'image_url': {'url': 'data:,', 'uuid': 2**64}}]}],
)  # fmt: skip


def hostile_bodies(model: str, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield which key holds the value of which number, and the body: pairs in a random order, again when used up."""
    pairs = [(key, number) for key in KEYS for number in range(len(VALUES))]
    random.Random(seed).shuffle(pairs)
    for at in range(count):
        key, number = pairs[at % len(pairs)]
        good = {'model': model, 'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 4, 'temperature': 0}
        yield f'{key} value {number}', json.dumps({**good, key: VALUES[number]}).encode()
