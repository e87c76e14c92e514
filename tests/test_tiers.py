"""A test without the mark ``server`` cannot start LMDeploy; one that takes a server's fixture gets the mark."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiers

from lmdeploy_vico.launch import ApiServer


def test_a_server_is_refused(tmp_path):
    server = ApiServer('m', log=tmp_path / 'log')
    with pytest.raises(tiers.UnmarkedStartError, match='LMDeploy process was started by a test that is not marked'):
        server.start()
    server.stop()


@pytest.mark.parametrize(
    'command',
    [
        ['/usr/bin/lmdeploy', 'serve', 'api_server', 'm'],
        [sys.executable, '-m', 'lmdeploy', 'serve', 'api_server', 'm'],
        ['lmdeploy-vico', 'demo'],
        [sys.executable, '-c', 'import lmdeploy; lmdeploy.pipeline("m")'],
    ],
)
def test_commands_are_refused(command):
    with pytest.raises(tiers.UnmarkedStartError):
        subprocess.run(command, check=False)


def test_other_programs_run():
    subprocess.run([sys.executable, '-S', '-c', 'print("lmdeploy serve api_server")'], check=True)


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
