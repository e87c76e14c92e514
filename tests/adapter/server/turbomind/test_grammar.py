"""A grammar is compiled by TurboMind's own compiler, in a thread, and handed over with the request."""

import pytest
from turbomind.program import run

pytestmark = pytest.mark.slow  # LMDeploy is imported anew each time

BEGINNING = """
import asyncio, copy, sys, threading
from types import SimpleNamespace
import pytest
from lmdeploy.messages import GenerationConfig
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.turbomind import turbomind
from lmdeploy_vico.adapter.server.generation.errors import ParameterError
from lmdeploy_vico.adapter.server.generation.grammar import GrammarCheck
from lmdeploy_vico.adapter.server.turbomind import grammar
from lmdeploy_vico.patching import Trigger, register

register.apply(Trigger.TURBOMIND)
compiled_in = []


class Compiler(turbomind._tm.GrammarCompiler):
    def compile_regex(self, regex):
        compiled_in.append(threading.current_thread().name)
        if regex == 'c+':
            raise ValueError('only in C++')
        return super().compile_regex(regex)


turbomind._tm.GrammarCompiler = Compiler
engine = turbomind.TurboMind.__new__(turbomind.TurboMind)
vars(engine).update(tokenizer=Tokenizer(sys.argv[1]), _vocab_size=1024, _grammar_compiler=None)
check = GrammarCheck(grammar.compiler_of(engine), 60)


def regex(text):
    return {'type': 'regex_schema', 'regex_schema': text}
"""

HANDED_OVER = """
given = []


class ModelRequest:
    set_grammar = given.append

    def forward(self, *arguments):
        raise EOFError  # far enough


vars(engine).update(
    engine_config=SimpleNamespace(empty_init=False, enable_metrics=False),
    model_comm=SimpleNamespace(create_request=ModelRequest)
)


async def answer():
    instance = turbomind.TurboMindInstance(engine)
    for _ in range(2):
        config = GenerationConfig(response_format=regex('[ab]+'))
        guided = grammar.guided(config, await check(config.response_format))
        assert type(config.response_format) is dict and guided.response_format == config.response_format
        with pytest.raises(EOFError):
            async for _ in instance.async_stream_infer(1, [5], gen_config=copy.deepcopy(guided)):
                pass
        assert guided.response_format is not None
    assert given[0] is given[1] is not None


asyncio.run(answer())
assert compiled_in == ['vico-grammar']
print('handed over')
"""

REFUSED = """
with pytest.raises(ParameterError, match='The response_format cannot be compiled: only in C[+][+]'):
    asyncio.run(check(regex('c+')))
with pytest.raises(ParameterError, match='The response_format cannot be compiled: .*parenthesis is not closed'):
    asyncio.run(check(regex('(')))
assert compiled_in == ['vico-grammar']
text = GenerationConfig(response_format={'type': 'text'})
assert grammar.guided(text, asyncio.run(check(text.response_format))).response_format is None
print('refused')
"""


def test_it_is_compiled_once_and_not_on_the_event_loop(make_checkpoint):
    assert run(BEGINNING + HANDED_OVER, make_checkpoint()) == 'handed over'


def test_what_only_turbomind_cannot_compile_is_refused(make_checkpoint):
    assert run(BEGINNING + REFUSED, make_checkpoint()) == 'refused'
