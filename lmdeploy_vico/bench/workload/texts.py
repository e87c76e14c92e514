"""Texts of exactly so many tokens, by the server's own tokenizer."""

import random
from collections.abc import Awaitable, Callable, Mapping

from lmdeploy_vico.bench import BenchError

VOCABULARY = """
a the of to and in is it on as at by for with from one two three time year people way day thing world school state
family student group country problem hand part place case week company system program question work number night
point home water room mother area money story fact month lot right study book eye job word side kind head house
service friend father power hour game line end member law car city name team minute idea body information back
parent face others level office door health person art war history party result change morning
"""
WORDS = tuple(VOCABULARY.split())
TRIES = 4
CHUNK = 256  # texts in one request to the tokenizer

Encode = Callable[[list[str]], Awaitable[list[int]]]


async def make_texts(encode: Encode, tokens: int, count: int, seed: int) -> list[str]:
    """Different random texts of ``tokens`` tokens each.

    Args:
        encode: gives the number of tokens of each of several texts.

    Raises:
        BenchError: the tokenizer cannot be steered to that length.
    """
    # A word's tokens hardly depend on its neighbours: tokenizers split at spaces first. Whatever differs is made again.
    first = dict(zip(WORDS, await encode(list(WORDS)), strict=True))
    later = dict(zip(WORDS, await encode([f' {word}' for word in WORDS]), strict=True))
    rng = random.Random(seed * 1_000_003 + tokens)
    texts: list[str] = []
    for _ in range(TRIES):
        wanted = [_compose(rng, first, later, tokens) for _ in range(count - len(texts))]
        for begin in range(0, len(wanted), CHUNK):
            chunk = wanted[begin : begin + CHUNK]
            texts += [text for text, length in zip(chunk, await encode(chunk), strict=True) if length == tokens]
        if len(texts) == count:
            return texts
    raise BenchError(f"No texts of exactly {tokens} tokens could be made with the server's tokenizer.")


def _compose(rng: random.Random, first: Mapping[str, int], later: Mapping[str, int], tokens: int) -> str:
    """Random words whose tokens add up to ``tokens``; raises :class:`BenchError` if none are found."""
    for _ in range(100):
        words: list[str] = []
        left = tokens
        while fitting := [word for word, cost in (later if words else first).items() if cost <= left]:
            words.append(rng.choice(fitting))
            left -= (later if len(words) > 1 else first)[words[-1]]
        if left == 0:
            return ' '.join(words)
    raise BenchError(f'No text of exactly {tokens} tokens could be made: --text-tokens asks for too few.')
