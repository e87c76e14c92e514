"""The text of an answer: whole characters while it is written, and the decoding of all its tokens when it has ended."""

import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from lmdeploy.tokenizer import DetokenizeState


class HuggingFaceTokenizer(Protocol):
    """What is used of a tokenizer of transformers'."""

    added_tokens_decoder: dict[int, Any]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        """The tokens' names in the vocabulary."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens."""


def _bytes_of_characters() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable ones as they are, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _bytes_of_characters()


def token_bytes(token: str) -> bytes:
    """The bytes of a token. One that was added to the vocabulary as it is has characters that stand for no byte."""
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:
        return token.encode('utf-8', errors='replace')


class AnswerText(DetokenizeState):
    """The decoder of one answer, in the place of LMDeploy's state.

    Bytes that may be the beginning of a character are kept until the character is whole, or cannot become whole. The
    pieces of text together are a beginning of what the tokenizer decodes from all tokens, whatever the pieces.
    """

    def __init__(self, ids_offset: int) -> None:
        super().__init__(ids_offset)
        self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

    def add(self, tokens: int, content: bytes) -> str:
        """Return the text that has become known with the bytes of a number of tokens."""
        self.ids_offset += tokens
        return self._decoder.decode(content)


class Detokenizer:
    """Takes the place of a tokenizer's ``detokenize_incrementally``; made for byte-level vocabularies."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer
        # Not all_special_tokens, by which LMDeploy goes: what decode() skips are those that were added as special.
        self._special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}

    def __call__(
        self,
        all_input_ids: Sequence[int],
        state: DetokenizeState,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> tuple[str, DetokenizeState]:
        """Return the text that has become known since the last call, and the state for the next one."""
        del spaces_between_special_tokens  # as in tokenizers of transformers' that are written in Rust
        if not isinstance(state, AnswerText):
            state = AnswerText(state.ids_offset)
        ids = all_input_ids[state.ids_offset :]
        shown = [token_id for token_id in ids if not (skip_special_tokens and token_id in self._special)]
        # A vocabulary is padded to a size that suits hardware; ids of the padding have no token.
        tokens = (token for token in self._tokenizer.convert_ids_to_tokens(shown) if token is not None)
        return state.add(len(ids), b''.join(map(token_bytes, tokens))), state


def is_byte_level(tokenizer: Any) -> bool:
    """Return whether a tokenizer of transformers' writes all text as bytes, as those of Qwen's models do."""
    from tokenizers.decoders import ByteLevel

    return isinstance(getattr(getattr(tokenizer, 'backend_tokenizer', None), 'decoder', None), ByteLevel)


class NamesAsBytes:
    """A byte-level tokenizer whose tokens are called by their bytes, not by how the vocabulary writes them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def convert_ids_to_tokens(self, token_id: int) -> bytes:
        """The bytes of a token, none for the padding of a vocabulary."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return b'' if token is None else token_bytes(token)


async def completed(
    outputs: AsyncGenerator[Any, None], tokenizer: HuggingFaceTokenizer, config: Any
) -> AsyncGenerator[Any, None]:
    """Yield LMDeploy's outputs of one answer, and end the last one with the text that its tokens still owe.

    Args:
        outputs: GenOut objects; the last has a ``finish_reason``.
        tokenizer: of the served model.
        config: the answer's GenerationConfig.
    """
    ids: list[int] = []
    given = 0  # characters
    async with aclosing(outputs):  # closing an answer tells the engine that nobody wants it any more
        async for output in outputs:
            if output.finish_reason is None:
                ids += output.token_ids or []
                given += len(output.response or '')
            else:
                whole = tokenizer.decode(ids, skip_special_tokens=config.skip_special_tokens) if ids else ''
                # The only tokens of a last output: the one that ended the answer, if the client asked for it.
                ending = tokenizer.decode(output.token_ids) if output.token_ids else ''
                output.response = whole[given:] + ending
            yield output
