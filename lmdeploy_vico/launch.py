"""Start an unmodified ``lmdeploy serve api_server`` on a free port, wait until it is ready, and stop it.

    with ApiServer(checkpoint, '--tp', '2', log=Path('server.log')) as server:
        requests.get(f'{server.url}/v1/models')

Tests, the demonstration and the benchmarks use it. It loads no torch.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from types import TracebackType

import psutil

from lmdeploy_vico.checkpoints.random.limits import server_arguments
from lmdeploy_vico.ports import hold_port

LOOPBACK = '127.0.0.1'
POLL = 0.1  # seconds between two requests for the server's health
HEALTH_TIMEOUT = 10  # seconds for such a request
STOP_TIMEOUT = 20  # seconds that a server has to end by itself after SIGINT


class ServerError(RuntimeError):
    """The server did not start, or has ended; the message ends with its log."""


class ApiServer:
    """A context manager around one ``lmdeploy serve api_server`` process and all its children.

    Args:
        checkpoint: what to serve; a tiny one gets the limits of :mod:`lmdeploy_vico.checkpoints.random.limits`.
        arguments: further command line arguments, which override those limits.
        environment: variables to set for the server; a value of None removes one.
        log: file for the server's output.
        timeout: seconds to wait until the server is ready.
        port: for the server, as that of one which is to be replaced; 0 for any that is free.
        program: what to run instead of the ``lmdeploy`` command. That is the one beside the running Python, whatever
            PATH says, or ``python -m lmdeploy`` if there is none, as after ``pip install --target``.

    Attributes:
        url: of the server, without a slash at the end.
        port: of the server, on the loopback interface.
        command: the server's command line.
        log: as given.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *arguments: str,
        log: Path,
        environment: Mapping[str, str | None] | None = None,
        timeout: float = 300,
        port: int = 0,
        program: Sequence[str] | None = None,
    ) -> None:
        self.log = log
        self._checkpoint, self._arguments, self._wanted_port = str(checkpoint), arguments, port
        self._choose_port()
        self._environment = environment or {}
        self._timeout = timeout
        beside = Path(sys.executable).with_name('lmdeploy')
        self._program = program or ([str(beside)] if beside.is_file() else [sys.executable, '-m', 'lmdeploy'])
        self._process: subprocess.Popen[bytes] | None = None

    def again(self, *arguments: str, log: Path) -> 'ApiServer':
        """Return a server of the same checkpoint that is not started, with more arguments and a log of its own."""
        return ApiServer(
            self._checkpoint,
            *self._arguments,
            *arguments,
            log=log,
            environment=self._environment,
            timeout=self._timeout,
            program=self._program,
        )

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

    def _choose_port(self) -> None:
        # The server takes its port only when its model is loaded.
        self._port_holder = hold_port(LOOPBACK, self._wanted_port)
        self.port = self._port_holder.getsockname()[1]
        self.url = f'http://{LOOPBACK}:{self.port}'
        address = ('--server-name', LOOPBACK, '--server-port', str(self.port))
        given = (*server_arguments(self._checkpoint), *self._arguments)
        self.command = ['lmdeploy', 'serve', 'api_server', self._checkpoint, *address, *given]

    def start(self) -> None:
        """Start the process and return at once."""
        if self._port_holder.fileno() < 0:  # it was started before, and its port is free again
            self._choose_port()
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
        """Return once ``/health`` answers.

        Raises:
            ServerError: the process ended, time ran out, or another program answers on the port.
        """
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            if not self.alive():
                raise ServerError(f'The server ended while starting:\n{self.log_tail()}')
            with (
                contextlib.suppress(OSError, HTTPException),
                urllib.request.urlopen(f'{self.url}/health', timeout=HEALTH_TIMEOUT),
            ):
                self._require_own_port()
                self._port_holder.close()
                return
            time.sleep(POLL)
        raise ServerError(f'The server was not ready after {self._timeout:g} s:\n{self.log_tail()}')

    def _require_own_port(self) -> None:
        """Raise ServerError if another program took the port, by its number, before the server did."""
        connections = psutil.Process(self.pid).net_connections('inet') if self.alive() else []
        if self.port not in [one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN]:
            raise ServerError(f'Another program listens on port {self.port}. Try again.\n{self.log_tail()}')

    def wait_until_ended(self) -> int:
        """Wait until a server that should refuse to start has ended; return its exit code."""
        assert self._process is not None
        return self._process.wait(timeout=self._timeout)

    @property
    def pid(self) -> int:
        """The id of the started process."""
        assert self._process is not None
        return self._process.pid

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Stop the server and every process that it started; do nothing if it was not started."""
        self._port_holder.close()
        if self._process is None:
            return
        try:
            if self.alive():
                self._process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=STOP_TIMEOUT)
        finally:  # also if a second interrupt arrives while we wait
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # the group holds nothing but the server's processes
            self._process.wait()

    @property
    def environment(self) -> Mapping[str, str | None]:
        """Variables in which the server's environment differs from this process's; None for a removed one."""
        return self._environment

    def log_text(self, most: int | None = None) -> str:
        """Return the server's output so far: all of it, or the last ``most`` bytes."""
        with self.log.open('rb') as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most) if most else 0)
            return file.read().decode(errors='replace')

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the log."""
        return '\n'.join(self.log_text().splitlines()[-lines:])
