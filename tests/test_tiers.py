"""A test without the mark ``server`` cannot start LMDeploy; one that takes a server's fixture gets the mark."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiers

from benchmarks.__main__ import COMMANDS
from lmdeploy_vico.launch import ApiServer

ROOT = Path(__file__).parents[1]


def test_a_server_is_refused(tmp_path):
    server = ApiServer('m', log=tmp_path / 'log')
    with pytest.raises(tiers.UnmarkedStartError, match='LMDeploy process was started by a test that is not marked'):
        server.start()
    server.stop()


BENCHMARKS = (
    ['counters', '--update'],
    ['first-token', '--model', 'm'],
    ['on-gpu', 'soak'],
    ['one-process', 'serve', 'api_server', 'm'],
    ['placement', '--model', 'm'],
    ['soak'],
)


@pytest.mark.parametrize(
    'command',
    [
        ['/usr/bin/lmdeploy', 'serve', 'api_server', 'm'],
        [sys.executable, '-m', 'lmdeploy', 'serve', 'api_server', 'm'],
        ['lmdeploy-vico', 'demo'],
        [sys.executable, '-m', 'lmdeploy_vico.cli', 'demo'],
        [sys.executable, '/usr/bin/lmdeploy-vico', 'demo'],
        ['lmdeploy-vico', 'bench', '--model', 'm'],
        [sys.executable, '-m', 'lmdeploy_vico.cli', 'bench', '--model=m'],
        *([sys.executable, '-m', 'benchmarks', *arguments] for arguments in BENCHMARKS),
        [sys.executable, '-c', 'import lmdeploy; lmdeploy.pipeline("m")'],
    ],
)
def test_commands_are_refused(command):
    with pytest.raises(tiers.UnmarkedStartError):
        subprocess.run(command, check=False)


def test_other_programs_run():
    subprocess.run([sys.executable, '-S', '-c', 'print("lmdeploy serve api_server")'], check=True)


@pytest.mark.parametrize(
    'command',
    [
        ['lmdeploy', 'check_env'],
        ['lmdeploy-vico', 'tiny', 'demo'],
        ['lmdeploy-vico'],
        ['lmdeploy-vico', 'bench', '--base-url', 'http://localhost:1'],
        ['lmdeploy-vico', 'demo', '--help'],
        ['python', '-m', 'benchmarks', 'soak', '--base-url=http://localhost:1'],
        ['python', '-m', 'benchmarks', 'soak', '--help'],
        ['python', '-m', 'benchmarks', 'vision'],
        ['python', '-m', 'pytest', 'benchmarks', 'soak'],
    ],
)
def test_commands_that_start_nothing_are_let_through(command):
    assert not tiers.starts_lmdeploy(command)


def test_every_benchmark_that_starts_a_server_or_an_engine_is_known():
    """By what its module calls."""
    starting = {
        name
        for name, (module, _) in COMMANDS.items()
        if re.search(r'\b(ApiServer|pipeline|first_token|Engine)\(|lmdeploy.cli import run|cli.main\(', source(module))
    }
    # on-gpu runs the others, and share starts an engine in a module beside it.
    assert starting | {'on-gpu', 'share'} == tiers.STARTING_COMMANDS['benchmarks']


def source(module):
    return (ROOT / Path(*module.split('.'))).with_suffix('.py').read_text()


def test_an_engine_is_refused(make_checkpoint):
    from lmdeploy.pytorch.engine.engine import Engine

    with pytest.raises(tiers.UnmarkedStartError, match='LMDeploy engine was started'):
        Engine(str(make_checkpoint()))


@pytest.mark.server
def test_a_marked_test_may_start_one():
    guard = tiers.Guard()
    guard.require_open('An LMDeploy engine')
    subprocess.run([sys.executable, '-S', '-c', '"pipeline("'], check=True)


@pytest.mark.parametrize(('fixtures', 'marks'), [(['tmp_path', 'serve'], ['server']), (['tmp_path'], [])])
def test_a_fixture_that_starts_a_server_marks_its_test(fixtures, marks):
    added = []
    tiers.mark(SimpleNamespace(fixturenames=fixtures, add_marker=added.append))
    assert added == marks
