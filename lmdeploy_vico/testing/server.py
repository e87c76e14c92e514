"""Runs the unmodified ``lmdeploy serve api_server`` as a user would, on a free port, and always stops it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

POLL = 0.1  # seconds between two looks at the server's health


class ServerError(RuntimeError):
    """The server did not start, or has died; the message ends with its log."""


class ApiServer:
    """A context manager around one ``lmdeploy serve api_server`` process and all its children.

    Args:
        checkpoint: what to serve.
        arguments: further command line arguments.
        environment: variables to set for the server; a value of None removes one.
        log: file for the server's output.
        timeout: seconds to wait until it is ready.
        program: what takes the place of the ``lmdeploy`` command of the Python that runs us, whatever PATH says; its
            module where there is no command beside that Python, as after ``pip install --target``.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *arguments: str,
        log: Path,
        environment: Mapping[str, str | None] | None = None,
        timeout: float = 300,
        program: Sequence[str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f'http://127.0.0.1:{self.port}'
        self.log = log
        address = ('--server-name', '127.0.0.1', '--server-port', str(self.port))
        self.command = ['lmdeploy', 'serve', 'api_server', str(checkpoint), *address, *arguments]
        self._environment = environment or {}
        self._timeout = timeout
        beside = Path(sys.executable).with_name('lmdeploy')
        self._program = program or ([str(beside)] if beside.is_file() else [sys.executable, '-m', 'lmdeploy'])
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> 'ApiServer':
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; returns at once."""
        environment = {**os.environ, **self._environment}
        with self.log.open('wb') as output:
            self._process = subprocess.Popen(
                [*self._program, *self.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in environment.items() if value is not None},
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Return once ``/health`` answers; raises :class:`ServerError` if the process ends or time runs out."""
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            if not self.alive():
                raise ServerError(f'The server ended while starting:\n{self.log_tail()}')
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f'{self.url}/health'):
                return
            time.sleep(POLL)
        raise ServerError(f'The server was not ready after {self._timeout:g} s:\n{self.log_tail()}')

    def wait_until_ended(self) -> int:
        """Wait for a server that is expected to refuse to start; returns its exit code."""
        assert self._process is not None
        return self._process.wait(timeout=self._timeout)

    @property
    def pid(self) -> int:
        """The process that was started; those that it starts are its children."""
        assert self._process is not None
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Stop the server and whatever it started; does nothing if it has ended."""
        if self._process is None:
            return
        if self.alive():
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: nothing else is in it
        self._process.wait()

    def log_text(self) -> str:
        """Everything the server has printed."""
        return self.log.read_text(errors='replace')

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the log."""
        return '\n'.join(self.log_text().splitlines()[-lines:])


def free_port() -> int:
    """A TCP port on the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
