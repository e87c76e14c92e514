"""``response_format`` on TurboMind: a grammar is compiled in a thread, once, and goes along with the request.

Left to itself, LMDeploy compiles on the event loop when a request is handed over, and answers without the grammar if
that fails.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from lmdeploy_vico.adapter.server.generation.grammar import compiling_with

REMEMBERED = 8  # compiled grammars: one may take many megabytes, and does not say how many


class Guide(dict[str, Any]):
    """A response format with the grammar that TurboMind's compiler has made of it.

    Attributes:
        grammar: an object of C++, which many requests may use at a time.
    """

    def __init__(self, response_format: dict[str, Any], grammar: Any) -> None:
        super().__init__(response_format)
        self.grammar = grammar

    def __deepcopy__(self, memo: Any) -> 'Guide':
        """LMDeploy copies the config of each request; a grammar cannot be copied, and nobody writes into this."""
        return self


def guided(config: Any, grammar: Any) -> Any:
    """Return a copy of a GenerationConfig that carries the grammar of its response format.

    Args:
        config: with a response format.
        grammar: None for one that asks for nothing, which is left away.
    """
    config = copy.copy(config)
    config.response_format = None if grammar is None else Guide(config.response_format, grammar)
    return config


def compiler_of(engine: Any) -> Callable[[dict[str, Any]], Any]:
    """Return what compiles response formats for an engine, in any thread; None comes of one that asks for nothing.

    Args:
        engine: LMDeploy's TurboMind, built.
    """
    return compiling_with(partial(_compiler, engine))


def _compiler(engine: Any) -> Any:
    from lmdeploy.turbomind import _tm
    from lmdeploy.turbomind.tokenizer_info import TokenizerInfo

    info = TokenizerInfo.from_huggingface(engine.tokenizer.model.model, vocab_size=engine._vocab_size)
    # LMDeploy's own would keep every grammar that it has ever compiled. Where LMDeploy looks for one, it finds this.
    engine._grammar_compiler = _tm.GrammarCompiler(info, cache_enabled=False)
    return engine._grammar_compiler
