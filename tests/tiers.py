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
# The programs, as commands and as modules, and those of their commands that start a server or an engine.
_VICO = {'bench', 'demo'}
STARTING_COMMANDS = {
    'lmdeploy': {'serve', 'chat'},
    'lmdeploy-vico': _VICO,
    'lmdeploy_vico.cli': _VICO,
    'benchmarks': {
        'counters',
        'first-token',
        'on-gpu',
        'one-process',
        'placement',
        'pressure',
        'reader',
        'share',
        'soak',
    },
}


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
    if '-c' in command:
        return any('pipeline(' in one for one in command)
    # The program, or Python and a script, or Python, -m and a module.
    for index, one in enumerate(command[:3]):
        starting = STARTING_COMMANDS.get(Path(one).name)
        if starting is not None:
            name, *arguments = *command[index + 1 :], ''
            asks_another = any(argument.partition('=')[0] == '--base-url' for argument in arguments)
            return name in starting and not asks_another and not {'-h', '--help'} & set(arguments)
    return False


def mark(item: pytest.Item) -> None:
    """Mark a test that starts LMDeploy through a fixture."""
    if STARTING & set(getattr(item, 'fixturenames', ())):
        item.add_marker('server')
