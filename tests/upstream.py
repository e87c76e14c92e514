"""A server for clients under test, in a thread of its own, on a free port; and the command line of LMDeploy's."""

import argparse
import contextlib
import json
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Answering(BaseHTTPRequestHandler):
    """Answers by :meth:`get` and :meth:`post`, sends texts and JSON, and logs nothing."""

    def get(self) -> None:
        self.send_error(404)

    def post(self) -> None:
        self.send_error(404)

    def do_GET(self) -> None:
        self.get()

    def do_POST(self) -> None:
        self.post()

    def send(self, text: str, kind: str = 'application/json') -> None:
        self.send_response(200)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value))

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers['Content-Length']))

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def listening(handler: type[Answering]) -> Iterator[str]:
    """The URL of a server that answers so, as long as the context is open."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@cache
def lmdeploys_parser() -> argparse.ArgumentParser:
    """The parser of the ``lmdeploy`` command, to which LMDeploy can add its own commands only once."""
    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe

    CLI.add_parsers()
    SubCliServe.add_parsers()
    return CLI.parser
