"""Runs commands one after another, each within what is left of a limit, and keeps what they print."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gates.parts import Step

GRACE = 25.0  # seconds for a command that is told to end to write what it has
MARGIN = 30.0  # seconds of a limit that are left for that


class Runner:
    """Runs steps; what they print, and a line before and after each, goes to stdout and to a file.

    Args:
        log: the file, which is appended to.
        limit: seconds of a part; None for no limit.
        environment: of the commands.
        folder: in which they run.
        spent: seconds of the first part's limit that are gone already.

    Attributes:
        failed: what did not succeed, in words.
        ended: whether this process has been told to end (TERM, INT or HUP): nothing is begun any more.
    """

    def __init__(
        self, log: Path, limit: float | None, environment: Mapping[str, str], folder: Path, spent: float
    ) -> None:
        self.failed: list[str] = []
        self.ended = False
        self._log = log.open('ab', buffering=0)
        self._limit, self._environment, self._folder = limit, environment, folder
        self._begun = self._part_begun = time.monotonic() - spent
        self._child: subprocess.Popen[bytes] | None = None
        self._interrupted = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._end)

    @property
    def seconds(self) -> int:
        """How long this has been running."""
        return int(time.monotonic() - self._begun)

    def end_part(self) -> None:
        """Have the next part's limit begin now."""
        self._part_begun = time.monotonic()

    def say(self, text: str) -> None:
        """Print and keep a line."""
        self._write(f'{text}\n'.encode())

    def step(self, step: Step) -> None:
        """Run a step; what happens to it is said, and kept in ``failed`` if it did not succeed."""
        if self.ended:
            return
        if step.skipped:
            self.say(f'==> {step.title}: skipped, {step.skipped}')
            return
        self.say(f'==> {step.title}')
        begun = time.monotonic()
        status, cut_off = self._run(step.command, step.environment)
        took = f'{time.monotonic() - begun:.0f} s'
        if cut_off:
            self.say(f'==> {step.title}: CUT OFF after {took}; what it has measured is kept')
        elif status:
            self.say(f'==> {step.title}: FAILED after {took}')
        else:
            self.say(f'==> {step.title}: done in {took}')
        if cut_off or status:
            self.failed.append(step.title)

    def _run(self, command: Sequence[str], variables: Mapping[str, str]) -> tuple[int, bool]:
        """The exit status, and whether the command took too long and was ended."""
        environment = {**self._environment, **variables}
        self._interrupted = False
        # In a process group of its own, which gets our signals as a whole. What started this process in the background
        # may have had it ignore SIGINT; since it is handled here, the command does not inherit that.
        self._child = child = subprocess.Popen(
            command,
            env=environment,
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if self.ended:  # since the step began
            self._interrupt()
        copying = threading.Thread(target=self._copy, args=(child,), name='output', daemon=True)
        copying.start()
        cut_off = False
        try:
            child.wait(self._left())
        except subprocess.TimeoutExpired:
            cut_off = True
            self._interrupt()
            try:
                child.wait(GRACE)
            except subprocess.TimeoutExpired:
                _signal_group(child, signal.SIGKILL)
                child.wait()
        self._child = None
        copying.join(GRACE)
        if copying.is_alive():  # a process that the command has left behind holds its output
            _signal_group(child, signal.SIGKILL)
            copying.join()
        return child.returncode, cut_off

    def _left(self) -> float | None:
        """Seconds that a command may take now."""
        if self._limit is None:
            return None
        return max(1.0, self._part_begun + self._limit - MARGIN - time.monotonic())

    def _copy(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        with child.stdout as output:
            while text := os.read(output.fileno(), 1 << 16):
                self._write(text)

    def _write(self, text: bytes) -> None:
        self._log.write(text)
        with contextlib.suppress(OSError):  # nobody reads any more: the file still gets all of it
            sys.stdout.flush()
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()

    def _end(self, *_: object) -> None:
        self.ended = True
        if self._child is not None:
            self._interrupt()

    def _interrupt(self) -> None:
        """Tell the command that runs to end, once: a second signal might meet it while it writes."""
        if self._child is not None and not self._interrupted:
            self._interrupted = True
            _signal_group(self._child, signal.SIGINT)


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
