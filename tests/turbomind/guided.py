"""Guided decoding of the stand-in: what TurboMind's binding has of xgrammar in C++, done by xgrammar's own package."""

import asyncio
from collections.abc import Sequence

import torch
import xgrammar


class TokenizerInfo:
    """The tokens of a vocabulary."""

    def __init__(
        self,
        encoded_vocab: Sequence[str | bytes],
        vocab_type: int,
        vocab_size: int | None = None,
        stop_token_ids: list[int] | None = None,
        add_prefix_space: bool = False,
    ) -> None:
        self.info = xgrammar.TokenizerInfo(
            encoded_vocab,
            xgrammar.VocabType(vocab_type),
            vocab_size=vocab_size,
            stop_token_ids=stop_token_ids,
            add_prefix_space=add_prefix_space,
        )

    @staticmethod
    def _detect_metadata_from_hf(backend: str) -> str:
        return str(xgrammar.base._core.TokenizerInfo._detect_metadata_from_hf(backend))


class GrammarCompiler:
    """Compiles grammars for a vocabulary."""

    def __init__(
        self,
        tokenizer_info: TokenizerInfo,
        max_threads: int = 8,
        cache_enabled: bool = True,
        max_memory_bytes: int = -1,
    ) -> None:
        _require_thread()
        self._compiler = xgrammar.GrammarCompiler(
            tokenizer_info.info,
            max_threads=max_threads,
            cache_enabled=cache_enabled,
            cache_limit_bytes=max_memory_bytes,
        )

    def compile_json_schema(self, schema: str) -> xgrammar.CompiledGrammar:
        _require_thread()
        return self._compiler.compile_json_schema(schema, any_whitespace=False)

    def compile_regex(self, regex: str) -> xgrammar.CompiledGrammar:
        _require_thread()
        return self._compiler.compile_regex(regex)

    def compile_structural_tag(self, tag: str) -> xgrammar.CompiledGrammar:
        _require_thread()
        return self._compiler.compile_structural_tag(tag)


def _require_thread() -> None:
    """Raise if this is the thread of an event loop, whose other clients would wait meanwhile."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise AssertionError('a grammar is compiled on the event loop')


class Guidance:
    """What the grammar of one answer allows; until it has ended, and everything afterwards."""

    def __init__(self, grammar: xgrammar.CompiledGrammar) -> None:
        self._matcher = xgrammar.GrammarMatcher(grammar)

    def forbid(self, logits: torch.Tensor) -> None:
        """Set the logits ``[V]`` of tokens that must not come next to -inf."""
        if self._matcher.is_terminated():
            return
        mask = xgrammar.allocate_token_bitmask(1, len(logits))
        self._matcher.fill_next_token_bitmask(mask)
        xgrammar.apply_token_bitmask_inplace(logits[None], mask)

    def accept(self, token: int) -> None:
        """Take note of a token that has been generated."""
        if not self._matcher.is_terminated():
            self._matcher.accept_token(token)
