"""HAProxy with the files of docs/deploy before servers of this machine, and stand-ins for such servers."""

import json
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from ports import free_port
from system.programs import program
from waiting import HANG

DEPLOY = Path(__file__).parents[2] / 'docs' / 'deploy'
NAMES = ('one', 'two', 'three')
BODY_BYTES = 16 * 2**20  # of haproxy.cfg
CHAT = '/v1/chat/completions'


def shipped(changes: dict[str, str]) -> str:
    """The shipped configuration with parts replaced that are sure to be there."""
    text = (DEPLOY / 'haproxy.cfg').read_text()
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def configuration(port: int, ports: Sequence[int]) -> str:
    """The shipped configuration, for an address and servers of this machine."""
    text = shipped({'/etc/haproxy/': f'{DEPLOY}/', 'bind :8000': f'bind 127.0.0.1:{port}'})
    lines = re.findall(r'^ *server one .*\n', text, re.MULTILINE)
    assert len(lines) == 2
    text = re.sub(r'^ *server two .*\n', '', text, flags=re.MULTILINE)
    for line in lines:
        made = ''
        for number, (name, own) in enumerate(zip(NAMES, ports, strict=False), 1):
            own_line = line.replace('server one 10.0.0.1:23333', f'server {name} 127.0.0.1:{own}')
            made += own_line.replace('id 1', f'id {number}').replace('media/one', f'media/{name}')
        text = text.replace(line, made)
    return text


class HaProxy:
    """A running HAProxy.

    Args:
        text: its configuration.
        port: where that has it listen.
        folder: for its files.
    """

    def __init__(self, text: str, port: int, folder: Path) -> None:
        self.url, self.port, self.log = f'http://127.0.0.1:{port}', port, folder / 'haproxy.log'
        self._config = folder / 'haproxy.cfg'
        self._config.write_text(text)

    def __enter__(self) -> 'HaProxy':
        with self.log.open('w') as log:
            command = [program('haproxy', 'haproxy'), '-f', self._config]
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + HANG
        while True:
            assert self._process.poll() is None and time.monotonic() < end, self.log.read_text()
            try:
                socket.create_connection(('127.0.0.1', self.port)).close()
                return self
            except ConnectionRefusedError:
                time.sleep(0.05)

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.wait()

    def processor_seconds(self) -> float:
        """What all threads have taken of the processors so far; raises NoSuchProcess where it has ended."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system


def balancer(folder: Path, *ports: int) -> HaProxy:
    """HAProxy as it is shipped, before servers at some ports."""
    port = free_port()
    return HaProxy(configuration(port, ports), port, folder)


def post(url: str, body: Any, **headers: str) -> tuple[int, Any, bytes]:
    """POST JSON, or bytes as they are; returns status, headers and body of the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {'Content-Type': 'application/json', **headers})
    try:
        with urllib.request.urlopen(request, timeout=HANG) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def asking(*items: dict, text: str = 'What is this?', **extra: Any) -> dict:
    """The body of a chat request with some items."""
    return {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': text}, *items]}], **extra}


def picture(url: str, **params: Any) -> dict:
    """An item of such a request."""
    return {'type': 'image_url', 'image_url': {'url': url, **params}}


class StandIn:
    """A server that answers as a test tells it to, and is well unless told otherwise.

    Args:
        answer: called with the handler of a request whose body has been read; it may send anything.
        port: to listen on; 0 for any.

    Attributes:
        seen: headers of the requests so far.
        well: whether ``/health`` says so.
    """

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None], port: int = 0) -> None:
        stand_in = self
        self.seen: list[Any] = []
        self.well = True

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self) -> None:
                reply(self, 200 if stand_in.well else 503)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers['Content-Length']))
                stand_in.seen.append(self.headers)
                answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256

            def handle_error(self, *arguments: Any) -> None:
                pass  # the other side may leave at any time

        self._server = Server(('127.0.0.1', port), Handler)
        self.port = self._server.server_port

        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.02})

    def __enter__(self) -> 'StandIn':
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port; does nothing if that has been done."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes = b'', **headers: str) -> None:
    """Send a whole answer; the names of headers have underscores for hyphens."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace('_', '-'), value)
    handler.send_header('Content-Length', str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def until(condition: Callable[[], Any]) -> None:
    """Ask again until it holds."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, 'it has not come so far'
        time.sleep(0.05)
