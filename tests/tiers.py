"""Keeps ``make check`` free of LMDeploy processes: a test that starts one without the mark ``server`` fails.

What is seen: a program that this process starts, by its command line, and an engine in this process.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import wrapt

# Fixtures that start a server or an engine: whoever takes one is marked.
STARTING = {'shared_server', 'serve'}


class UnmarkedStartError(AssertionError):
    """A test without the mark ``server`` started a server or an engine."""


class Guard:
    """Knows whether the test that runs may start LMDeploy."""

    def __init__(self) -> None:
        self.closed = False

    def require_open(self, what: str) -> None:
        """Raises :class:`UnmarkedStartError` while a test runs that may not start ``what``."""
        if self.closed:
            raise UnmarkedStartError(f'{what} was started by a test that is not marked "server"')

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook of the interpreter, see :func:`sys.addaudithook`."""
        if event == 'subprocess.Popen' and starts_lmdeploy([str(one) for one in arguments[1]]):
            self.require_open('An LMDeploy process')

    def install(self) -> None:
        """Watch this process, until it ends."""
        sys.addaudithook(self.audit)
        wrapt.register_post_import_hook(self._watch_engine, 'lmdeploy.pytorch.engine.engine')

    def _watch_engine(self, module: Any) -> None:
        def init(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> None:
            self.require_open('An LMDeploy engine')
            wrapped(*args, **kwargs)

        wrapt.wrap_function_wrapper(module, 'Engine.__init__', init)


def starts_lmdeploy(command: Sequence[str]) -> bool:
    """Return whether a command serves with LMDeploy, or runs Python code that makes a pipeline."""
    program = {Path(one).name for one in command[:3]}
    serves = 'lmdeploy' in program and 'serve' in command
    demonstrates = 'lmdeploy-vico' in program and 'demo' in command
    return serves or demonstrates or ('-c' in command and any('pipeline(' in one for one in command))


def mark(item: pytest.Item) -> None:
    """Mark a test that starts LMDeploy through a fixture."""
    if STARTING & set(getattr(item, 'fixturenames', ())):
        item.add_marker('server')
