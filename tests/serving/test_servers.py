"""Shared servers: tests of a configuration follow each other, and its server runs from the first to the last."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from serving import servers
from serving.servers import Configuration, SharedServer, grouped


def item(name, mark=None, fixtures=()):
    return SimpleNamespace(name=name, fixturenames=fixtures, get_closest_marker=lambda _: mark and mark.mark)


PLAIN = pytest.mark.served()
LONG = pytest.mark.served('--session-len', '64')
MOE = pytest.mark.served('--session-len', '64', checkpoint={'llm': 'moe'})
SET = pytest.mark.served('--session-len', '64', OPTION='1')


def test_tests_of_a_configuration_follow_its_first():
    items = [item('a'), item('b', LONG), item('c', MOE), item('d'), item('e', LONG), item('f', PLAIN), item('g', MOE)]
    assert ''.join(one.name for one in grouped(items)) == 'abecgdf'


def test_a_test_that_ends_the_server_is_its_last():
    items = [item('a', LONG, ('client', 'last_client')), item('b'), item('c', LONG, ('client',)), item('d', LONG)]
    assert ''.join(one.name for one in grouped(items)) == 'cdab'


def test_configurations_differ_in_any_part():
    marks = (PLAIN, LONG, MOE, SET)
    assert len({Configuration.of(item('', mark)) for mark in marks}) == len(marks)
    again = pytest.mark.served('--session-len', '64', OPTION='1')
    assert Configuration.of(item('', again)) == Configuration.of(item('', SET))
    assert Configuration.of(item('')) is None and Configuration.of(None) is None


@pytest.fixture
def events(monkeypatch):
    """What becomes of servers; one whose arguments are those of MOE does not start."""
    seen = []

    @contextmanager
    def server(checkpoint, *arguments, log, environment, timeout):
        name = ' '.join([checkpoint, *arguments, *environment])
        seen.append(f'start {name}')
        if checkpoint == 'moe':
            raise RuntimeError('no server')
        yield name
        seen.append(f'stop {name}')

    monkeypatch.setattr(servers, 'ApiServer', server)
    monkeypatch.setattr(servers, 'Client', lambda name: f'client of {name}')
    return seen


@pytest.fixture
def shared(tmp_path):
    return SharedServer(lambda llm='dense': llm, tmp_path)


def test_a_server_runs_until_another_configuration_comes(events, shared):
    long, other = (Configuration.of(item('', mark)) for mark in (LONG, SET))
    for _ in range(2):
        assert shared.client(long) == 'client of dense --session-len 64'
        shared.stop_unless_needed(long)
    assert events == ['start dense --session-len 64']
    shared.stop_unless_needed(None)
    assert events[1:] == ['stop dense --session-len 64']
    shared.client(other)
    shared.client(long)
    shared.stop()
    shared.stop()
    name = 'dense --session-len 64'
    assert events[2:] == [f'start {name} OPTION', f'stop {name} OPTION', f'start {name}', f'stop {name}']


def test_a_server_that_does_not_start_is_tried_once(events, shared):
    moe = Configuration.of(item('', MOE))
    with pytest.raises(RuntimeError, match='no server'):
        shared.client(moe)
    for _ in range(2):
        with pytest.raises(AssertionError, match='did not start'):
            shared.client(moe)
    assert len(events) == 1
