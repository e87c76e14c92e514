"""Which tokens a stop word stops at, found without decoding tens of thousands of tokens for each word."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lmdeploy_vico.adapter.server.generation.text import token_bytes

MOST = 5  # tokens of a word, as in LMDeploy
REMEMBERED = 1024  # words


def stop_token_finder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return what takes the place of ``indexes_containing_token`` of a byte-level tokenizer.

    It finds what that finds, and the space, for which LMDeploy looks under another name.

    Args:
        tokenizer: LMDeploy's HuggingFaceTokenizer.

    Returns:
        a function from a word to the ids of the tokens that contain it, if they are few, else of those that are the
        word.
    """
    names: list[str] = []  # by id, without those that were added to the vocabulary

    @lru_cache(REMEMBERED)
    def find(word: str) -> tuple[int, ...]:
        if not names:
            names.extend(tokenizer.model.convert_ids_to_tokens(list(range(tokenizer.vocab_size))))
        containing = [token_id for token_id, name in enumerate(names) if word in name]
        if len(containing) > MOST:
            content = word.encode('utf-8', errors='replace')
            containing = [token_id for token_id in containing if token_bytes(names[token_id]) == content][:MOST]
        if containing:
            return tuple(containing)
        ids = tokenizer.encode(word, False)
        return tuple(ids) if len(ids) == 1 else ()

    return lambda word: list(find(word))
