"""Where a server's command comes from; what becomes of one that does not start, or is stopped at a bad moment."""

import http.server
import os
import sys
import sysconfig
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from lmdeploy import PytorchEngineConfig
from ports import given_by_chance
from upstream import lmdeploys_parser
from waiting import HANG

from lmdeploy_vico.checkpoints.random import make_checkpoint_without_weights
from lmdeploy_vico.checkpoints.random.limits import TINY_ENGINE, TINY_SERVER
from lmdeploy_vico.launch import ApiServer, ServerError

ROOT = Path(__file__).parents[2]
WAITS = (sys.executable, '-c', 'import signal; signal.pause()')


@pytest.fixture
def stranger():
    """A port on which a server of somebody else answers every request."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(('127.0.0.1', 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.busy
def test_a_port_that_somebody_else_has_taken(stranger, tmp_path, monkeypatch):
    holder = SimpleNamespace(getsockname=lambda: ('127.0.0.1', stranger), close=lambda: None, fileno=lambda: -1)
    monkeypatch.setattr('lmdeploy_vico.launch.hold_port', lambda address, port: holder)
    server = ApiServer('m', log=tmp_path / 'log', program=WAITS)
    with pytest.raises(ServerError, match=f'Another program listens on port {stranger}'), server:
        pass
    assert not server.alive()


LISTENS = """
import http.server, sys
open(sys.argv[-1]).read()  # the test has looked at the port
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
address = '127.0.0.1', int(sys.argv[sys.argv.index('--server-port') + 1])
http.server.HTTPServer(address, Answer).serve_forever()
"""


@pytest.mark.slow
@pytest.mark.busy
def test_nobody_is_given_the_port_while_the_server_loads(tmp_path):
    gate = tmp_path / 'gate'
    os.mkfifo(gate)
    server = ApiServer('m', str(gate), log=tmp_path / 'log', program=(sys.executable, '-c', LISTENS), timeout=HANG)
    server.start()
    try:
        assert not given_by_chance(server.port)
        gate.write_text('')  # waits until the server opens it
        server.wait_until_ready()
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.busy
def test_a_server_that_is_stopped_lets_its_port_go(tmp_path):
    def lets_go():
        server = ApiServer('m', log=tmp_path / 'log', program=WAITS)
        server.start()
        assert not given_by_chance(server.port)
        server.stop()
        return given_by_chance(server.port)

    assert any(lets_go() for _ in range(5))  # some program of this machine may be faster


@pytest.mark.busy
def test_stopping_that_is_interrupted_ends_the_server_all_the_same(tmp_path, monkeypatch):
    server = ApiServer('m', log=tmp_path / 'log', program=WAITS)
    server.start()
    process = psutil.Process(server.pid)
    wait, calls = server._process.wait, []

    def interrupted(timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(timeout)

    monkeypatch.setattr(server._process, 'wait', interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert not process.is_running()


def test_a_tiny_checkpoint_gets_few_kv_blocks_and_small_batches(make_checkpoint, tmp_path):
    for checkpoint in (make_checkpoint(), make_checkpoint(flash=False, llm='moe')):
        server = ApiServer(checkpoint, '--tp', '2', log=tmp_path / 'log')
        limits = ['--max-batch-size', '32', '--num-gpu-blocks', '4096']
        assert server.command[3] == str(checkpoint) and server.command[-6:] == [*limits, '--tp', '2']
    given = ApiServer(make_checkpoint(), '--max-batch-size', '8', log=tmp_path / 'log')
    assert given.command.index('8') > given.command.index('32'), 'the last one counts'


def test_other_checkpoints_are_served_as_lmdeploy_would(tmp_path):
    sized = make_checkpoint_without_weights(tmp_path / '1B', '1B')
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'tiny_checkpoint.json').write_text('{"not": ')
    for model in (sized, other, 'OpenGVLab/InternVL3_5-8B-Flash'):
        server = ApiServer(model, '--tp', '2', log=tmp_path / 'log')
        assert server.command[3] == str(model) and server.command[-3:] == [str(server.port), '--tp', '2']


@pytest.mark.slow
def test_the_limits_of_a_tiny_checkpoint_are_lmdeploys_own_options(make_checkpoint):
    """They reach the engine's config, and leave the decode graphs' tables small and the prompts of the tests room."""
    parsed = lmdeploys_parser().parse_args(['serve', 'api_server', str(make_checkpoint()), *TINY_SERVER])
    assert {name: getattr(parsed, name) for name in TINY_ENGINE} == TINY_ENGINE
    config = PytorchEngineConfig(**TINY_ENGINE)
    assert config.max_batch_size * config.num_gpu_blocks * 4 <= 1 << 20, 'bytes of a table'
    assert config.num_gpu_blocks * config.block_size >= config.max_batch_size * 8192, 'tokens'


def test_the_end_of_a_log(tmp_path):
    server = ApiServer('m', log=tmp_path / 'log')
    server.log.write_text('one\ntwo\n')
    assert (server.log_text(), server.log_text(4), server.log_text(100)) == ('one\ntwo\n', 'two\n', 'one\ntwo\n')


@pytest.mark.long
@pytest.mark.server
def test_lmdeploy_has_no_command_beside_the_interpreter(tmp_path, monkeypatch, make_checkpoint):
    bare = tmp_path / 'python'
    bare.symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setattr(sys, 'executable', str(bare))
    # What is installed is found by its path alone, and so are entry points.
    environment = {'PYTHONPATH': os.pathsep.join([str(ROOT), sysconfig.get_path('purelib')])}
    with ApiServer(make_checkpoint(), log=tmp_path / 'log', environment=environment, timeout=HANG) as server:
        assert server.command[0] == 'lmdeploy', 'what a user would type'
        assert 'vision side:' in server.log_text()
        with urllib.request.urlopen(f'{server.url}/v1/models') as answer:
            assert answer.status == 200
    (tmp_path / 'lmdeploy').write_text('#!/bin/sh\necho beside\n')
    (tmp_path / 'lmdeploy').chmod(0o755)
    server = ApiServer('x', log=tmp_path / 'log', timeout=HANG)
    server.start()
    assert server.wait_until_ended() == 0
    assert server.log_text() == 'beside\n'
