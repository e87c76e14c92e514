"""Response formats are tried in a thread, with a compiler that is LMDeploy's or one of the test's."""

import asyncio
import json
import threading

import pytest
from lmdeploy.tokenizer import Tokenizer

from lmdeploy_vico.adapter.server.generation import grammar
from lmdeploy_vico.adapter.server.generation.errors import ParameterError
from lmdeploy_vico.adapter.server.generation.grammar import AT_ONCE, GrammarCheck, compiler_of
from lmdeploy_vico.adapter.server.overload import OverloadError

REGEX = {'type': 'regex_schema', 'regex_schema': '[ab]+'}
PATIENCE = 60  # seconds for what takes milliseconds on a quiet host


def schema(value):
    return {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': value}}


@pytest.fixture(scope='module')
def compile_as_engine(make_checkpoint):
    return compiler_of(Tokenizer(str(make_checkpoint())).model.model, 1024)


GOOD = {
    'regex': REGEX,
    'any object': {'type': 'json_object'},
    'schema': schema({'type': 'object', 'properties': {'name': {'type': 'string'}}, 'required': ['name']}),
    'text': {'type': 'text'},
}
NESTED = 'x'
for _ in range(70):
    NESTED = {'a': NESTED}
BAD = {
    'parenthesis': (dict(REGEX, regex_schema='('), 'cannot be compiled: .*parenthesis is not closed'),
    'unknown type': (schema({'type': 'nonsense'}), 'cannot be compiled: Unsupported type "nonsense"'),
    'no schema': ({'type': 'json_schema'}, 'cannot be compiled'),
    'unknown kind': ({'type': 'haiku'}, 'cannot be compiled: unsupported format type: haiku'),
    'nested': (schema(NESTED), 'must not be nested more than 64 levels'),
    'large': (dict(REGEX, regex_schema='a' * 2**16), r'at most 65536 bytes, not 655\d\d'),
    'no object': ('regex', 'must be an object'),
    'not JSON': (dict(REGEX, extra={1, 2}), 'must be JSON'),
    'endless reference': (schema({'$ref': '#/$defs/none'}), 'cannot be compiled'),
}


@pytest.mark.parametrize('response_format', GOOD.values(), ids=GOOD.keys())
def test_good_formats(compile_as_engine, response_format):
    asyncio.run(GrammarCheck(compile_as_engine, PATIENCE)(response_format))


@pytest.mark.parametrize('response_format, message', BAD.values(), ids=BAD.keys())
def test_bad_formats(compile_as_engine, response_format, message):
    with pytest.raises(ParameterError, match=message) as error:
        asyncio.run(GrammarCheck(compile_as_engine, PATIENCE)(response_format))
    assert '.cc' not in str(error.value) and len(str(error.value)) < 300


class Slow:
    """A compiler that waits until it is let go."""

    def __init__(self):
        self.go = threading.Event()
        self.calls = []

    def __call__(self, response_format):
        self.calls.append(response_format)
        assert self.go.wait(PATIENCE)


def test_what_takes_too_long_is_refused_and_others_are_told_to_wait():
    slow = Slow()

    async def clients():
        check = GrammarCheck(slow, seconds=0.05)
        for number in range(AT_ONCE):
            with pytest.raises(ParameterError, match=r'took longer than 0\.05 seconds to compile. Simplify it'):
                await check({'type': 'regex_schema', 'regex_schema': str(number)})
        with pytest.raises(OverloadError, match='Other response formats are being compiled'):
            await check(REGEX)
        assert len(slow.calls) == AT_ONCE
        slow.go.set()  # the threads that were given up come to their end, and make room
        patient = GrammarCheck(slow, seconds=PATIENCE)
        patient._threads = check._threads
        await patient(REGEX)

    asyncio.run(clients())


def test_a_format_is_compiled_once_however_it_is_written(monkeypatch):
    monkeypatch.setattr(grammar, 'REMEMBERED', 2)
    compiled = []

    async def clients():
        check = GrammarCheck(compiled.append, PATIENCE)
        for _ in range(3):
            await check(json.loads(json.dumps(REGEX)))
        for name in ('json_object', 'text'):
            await check({'type': name})
        await check(REGEX)  # forgotten meanwhile

    asyncio.run(clients())
    assert compiled == [REGEX, {'type': 'json_object'}, {'type': 'text'}, REGEX]


def test_a_client_that_leaves_disturbs_nobody():
    slow = Slow()

    async def clients():
        check = GrammarCheck(slow, PATIENCE)
        first = asyncio.create_task(check(REGEX))
        while not slow.calls:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        slow.go.set()
        await check({'type': 'text'})

    asyncio.run(clients())


def test_the_choices_of_a_request_share_a_trial():
    slow = Slow()

    async def clients():
        check = GrammarCheck(slow, PATIENCE)
        choices = [asyncio.create_task(check(REGEX)) for _ in range(4 * AT_ONCE)]
        while not slow.calls:
            await asyncio.sleep(0)
        choices[0].cancel()
        slow.go.set()
        left = await asyncio.gather(*choices, return_exceptions=True)
        assert [type(one) for one in left] == [asyncio.CancelledError] + [type(None)] * (len(choices) - 1)

    asyncio.run(clients())
    assert slow.calls == [REGEX]
