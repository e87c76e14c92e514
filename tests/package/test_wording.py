"""What messages repeat of what a client sent."""

import pytest

from lmdeploy_vico.wording import shortened, shown


@pytest.mark.parametrize(
    'value', [5, 'text', "it's", None, True, 2.5, [], {}, [1, 'a'], {'a': 1}, b'x', ('a', 'b', 'c', 'd')]
)
def test_short_values_are_written_out(value):
    written = repr(list(value)) if isinstance(value, tuple) else repr(value)
    assert shown(value) == written


def test_long_values_are_cut():
    assert shown('a' * 81) == repr('a' * 80) + '... (81 characters)'
    assert shown(b'a' * 81) == repr(b'a' * 80) + '... (81 bytes)'
    assert shown([1, 2, 3, 4, 5]) == '[1, 2, 3, 4, ...]'
    assert shown({'a': [1], 'b': {}, 'c': {'d': 1}}) == "{'a': [...], 'b': {}, 'c': {...}}"


def nested(depth):
    value = 5
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    'value',
    [
        'a' * 10**6,
        ['a' * 10**6] * 10,
        {'a' * 10**6: 'b' * 10**6},
        nested(900),
        [[['a' * 10**6]]],
        10**4000,
        10**5000,
        '🙂' * 10**5,
    ],
    ids=['text', 'texts', 'object', 'deep', 'nested', 'number', 'unwritable number', 'characters'],
)
def test_nothing_is_repeated_at_length(value):
    assert len(shown(value).encode()) < 2000


def test_messages():
    assert shortened('short') == 'short'
    long = shortened('The beginning' + 'x' * 10**6 + 'the end.')
    assert long.startswith('The beginning') and long.endswith('the end.') and len(long) < 1100
    assert shortened('half \ud800 a pair') == 'half ? a pair'
