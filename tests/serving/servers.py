"""Servers that tests share: one for each configuration, started for its first test and stopped after its last.

    @pytest.mark.served('--enable-prefix-caching', checkpoint={'llm': 'moe'}, LMDEPLOY_VICO_COMPRESSION='all')

The mark names the server's arguments, the kind of tiny checkpoint and the environment; the fixture ``client`` is a
client of that server. Other tests have used it before: compare differences of its counters, and where a picture must
not be cached yet, send one that no other test sends. A test that stops or kills the server takes ``last_client``, and
runs after all others of the configuration. A test that needs a server of its own takes ``serve``.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving.client import Client
from waiting import HANG

from lmdeploy_vico.launch import ApiServer

ENDING = 'last_client'  # the fixture of tests that end the server


@dataclass(frozen=True)
class Configuration:
    """What a shared server serves, and how."""

    checkpoint: tuple[tuple[str, Any], ...]
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, item: pytest.Item | None) -> 'Configuration | None':
        """The configuration that a test's mark names; None without a mark."""
        mark = item.get_closest_marker('served') if item else None
        if mark is None:
            return None
        environment = dict(mark.kwargs)
        checkpoint = environment.pop('checkpoint', {})
        return cls(tuple(sorted(checkpoint.items())), mark.args, tuple(sorted(environment.items())))


def grouped(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests in their order, but with all tests of a configuration right after its first one.

    Those that end the server come last.
    """
    first: dict[Configuration, int] = {}

    def place(index: int) -> tuple[int, bool, int]:
        configuration = Configuration.of(items[index])
        if configuration is None:
            return index, False, index
        return first.setdefault(configuration, index), ENDING in getattr(items[index], 'fixturenames', ()), index

    return [items[index] for index in sorted(range(len(items)), key=place)]


class SharedServer:
    """The one shared server that runs at a time."""

    def __init__(self, make_checkpoint: Callable[..., Path], logs: Path) -> None:
        self._make_checkpoint, self._logs = make_checkpoint, logs
        self._configuration: Configuration | None = None
        self._client: Client | None = None
        self._resources = contextlib.ExitStack()

    def client(self, configuration: Configuration) -> Client:
        """A client of the configuration's server, which is started if it does not run."""
        if configuration != self._configuration:
            self.stop()
            self._configuration = configuration
            self._client = self._start(configuration)
        assert self._client is not None, 'the server of this configuration did not start'
        return self._client

    def _start(self, configuration: Configuration) -> Client:
        checkpoint = self._make_checkpoint(**dict(configuration.checkpoint))
        log = self._logs / f'{len(list(self._logs.iterdir()))}.log'
        environment = dict(configuration.environment)
        server = ApiServer(checkpoint, *configuration.arguments, log=log, environment=environment, timeout=HANG)
        return Client(self._resources.enter_context(server))

    def stop_unless_needed(self, configuration: Configuration | None) -> None:
        """Stop the server unless it is this configuration's."""
        if configuration != self._configuration:
            self.stop()

    def stop(self) -> None:
        """Stop the server; does nothing if none runs."""
        self._configuration = self._client = None
        self._resources.close()
