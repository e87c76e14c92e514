"""What becomes of a server that does not start as it should, or is stopped at a bad moment."""

import http.server
import sys
import threading

import psutil
import pytest

from lmdeploy_vico.testing.server import ApiServer, ServerError

SLEEPS = (sys.executable, '-c', 'import time; time.sleep(60)')


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


def test_a_port_that_somebody_else_has_taken(stranger, tmp_path):
    server = ApiServer('m', log=tmp_path / 'log', program=SLEEPS)
    server.port, server.url = stranger, f'http://127.0.0.1:{stranger}'
    with pytest.raises(ServerError, match=f'Another program listens on port {stranger}'), server:
        pass
    assert not server.alive()


def test_stopping_that_is_interrupted_ends_the_server_all_the_same(tmp_path, monkeypatch):
    server = ApiServer('m', log=tmp_path / 'log', program=SLEEPS)
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


def test_the_end_of_a_log(tmp_path):
    server = ApiServer('m', log=tmp_path / 'log')
    server.log.write_text('one\ntwo\n')
    assert (server.log_text(), server.log_text(4), server.log_text(100)) == ('one\ntwo\n', 'two\n', 'one\ntwo\n')
