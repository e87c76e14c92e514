"""How servers end: every client is told, and no process is left."""

import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil
import pytest
from serving.configurations import CACHING, COMPRESSED, DEFAULT, LIMITED, TWO_RANKS
from waiting import HANG

from lmdeploy_vico.launch import ApiServer

MANY = 4000  # tokens, which take longer than anything here


def body(client, stream=True, tokens=MANY):
    messages = [{'role': 'user', 'content': 'hello'}]
    return {'model': client.model, 'messages': messages, 'max_tokens': tokens, 'ignore_eos': True, 'stream': stream}


def ask(server, path, sent=None):
    """Status, headers and what was answered, of a server that may be about to end."""
    data = json.dumps(sent).encode() if sent else None
    request = urllib.request.Request(server.url + path, data, {'Content-Type': 'application/json'})
    try:
        with urllib.request.urlopen(request, timeout=HANG) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def ask_until(server, status):
    """Ask for the health until it is what is waited for, and return what was answered then."""
    deadline = time.monotonic() + HANG
    while (answer := ask(server, '/health'))[0] != status:
        assert time.monotonic() < deadline
    return answer


class Asked(threading.Thread):
    """A client that waits for its answer; ``begun`` once the server has sent something."""

    def __init__(self, server, sent):
        super().__init__(daemon=True)
        self.server, self.sent, self.begun, self.text, self.status = server, sent, threading.Event(), '', 0
        self.start()

    def run(self):
        data = json.dumps(self.sent).encode()
        request = urllib.request.Request(
            f'{self.server.url}/v1/chat/completions', data, {'Content-Type': 'application/json'}
        )
        try:
            with urllib.request.urlopen(request, timeout=HANG) as response:
                self.status = response.status
                for line in response:
                    self.begun.set()
                    self.text += line.decode()
        except urllib.error.HTTPError as error:
            self.status, self.text = error.code, error.read().decode()


@pytest.fixture
def processes(last_client):
    """The processes that the server has started, and which of them is its engine's."""
    children = psutil.Process(last_client.server.pid).children(recursive=True)
    [engine] = [child for child in children if 'ZMQMPEngine' in child.name()]
    return children, engine


def are_told(client, sentence):
    """Those who ask now, for the health or an answer, are told to come again, and why."""
    for path, sent in {'/health': None, '/v1/chat/completions': body(client)}.items():
        status, headers, text = ask(client.server, path, sent)
        assert status == 503 and headers['Retry-After'] == '5' and sentence in text


@DEFAULT
def test_the_engine_is_stopped_and_killed(last_client, processes):
    server, (children, engine) = last_client.server, processes
    said_before = len(server.log_text())
    engine.suspend()
    _, headers, text = ask_until(server, 503)
    assert headers['Retry-After'] == '5' and 'SIGCONT' in text
    engine.resume()
    ask_until(server, 200)
    streaming, waiting = (Asked(server, body(last_client, stream)) for stream in (True, False))
    assert streaming.begun.wait(HANG)
    engine.kill()
    for one in (streaming, waiting):
        one.join(HANG)
    assert waiting.status == 503 and 'The inference engine has ended' in waiting.text
    assert streaming.status == 200 and '"code": 503' in streaming.text and streaming.text.rstrip().endswith('[DONE]')
    assert server.wait_until_ended() == 1
    assert psutil.wait_procs(children, HANG)[1] == []
    assert 'Traceback' not in server.log_text()[said_before:]


@COMPRESSED
def test_the_engine_is_killed_and_the_server_stays(last_client, processes):
    _, engine = processes
    engine.kill()
    ask_until(last_client.server, 503)
    are_told(last_client, 'has to be restarted')
    assert last_client.server.alive()


@LIMITED
def test_a_server_is_told_to_stop(last_client, processes):
    server, (children, _) = last_client.server, processes
    running = Asked(server, body(last_client, tokens=600))
    assert running.begun.wait(HANG)
    os.kill(server.pid, signal.SIGTERM)
    are_told(last_client, 'shutting down')
    running.join(HANG)
    assert '"finish_reason": "length"' in running.text and running.text.rstrip().endswith('[DONE]')
    assert server.wait_until_ended() in (0, -signal.SIGTERM)
    assert psutil.wait_procs(children, HANG)[1] == []


@CACHING
def test_a_server_is_killed(last_client, processes):
    server, (children, _) = last_client.server, processes
    running = Asked(server, body(last_client))
    assert running.begun.wait(HANG)
    os.kill(server.pid, signal.SIGKILL)
    server.wait_until_ended()
    assert psutil.wait_procs(children, HANG)[1] == []


@TWO_RANKS
def test_a_rank_is_killed(last_client, processes):
    server, (children, engine) = last_client.server, processes
    waiting = Asked(server, body(last_client))
    assert waiting.begun.wait(HANG)
    max(engine.children(), key=lambda child: child.memory_info().rss).kill()
    waiting.join(HANG)
    assert '"code": 503' in waiting.text and waiting.text.rstrip().endswith('[DONE]')
    assert server.wait_until_ended() == 1
    assert psutil.wait_procs(children, HANG)[1] == []
    log = server.log_text()
    assert 'has ended: the engine cannot go on' in log and 'Traceback' not in log


FEW_FILES = (
    'import os, resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); '
    'sys.argv[0] = "lmdeploy"; runpy.run_module("lmdeploy", run_name="__main__", alter_sys=True)'
)


@pytest.mark.long
@pytest.mark.server
def test_a_server_with_few_descriptors_refuses_connections(make_checkpoint, tmp_path):
    program = [sys.executable, '-c', FEW_FILES]
    with ApiServer(make_checkpoint(), log=tmp_path / 'log', program=program) as server:
        clients = [socket.create_connection(('127.0.0.1', server.port), timeout=HANG) for _ in range(150)]
        try:
            assert clients[-1].recv(1000).startswith(b'HTTP/1.1 503 ')
        finally:
            for client in clients:
                client.close()
        ask_until(server, 200)
        log = server.log_text()
    assert 'connections refused' in log and 'Traceback' not in log and log.count('\n') < 100
