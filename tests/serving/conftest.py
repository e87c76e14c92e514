"""Servers: shared ones by configuration, and those that a test has for itself."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving.client import Client
from serving.servers import Configuration, SharedServer, grouped
from waiting import HANG

from lmdeploy_vico.launch import ApiServer

SHARED = pytest.StashKey[SharedServer]()


@pytest.hookimpl(trylast=True)  # pytest's own grouping by parameters comes before
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = grouped(items)


@pytest.hookimpl(trylast=True)  # fixtures that ask the server once more are torn down before
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if SHARED in item.config.stash:
        item.config.stash[SHARED].stop_unless_needed(Configuration.of(nextitem))


@pytest.fixture(scope='session')
def shared_server(make_checkpoint, tmp_path_factory, pytestconfig) -> Iterator[SharedServer]:
    server = pytestconfig.stash[SHARED] = SharedServer(make_checkpoint, tmp_path_factory.mktemp('servers'))
    yield server
    server.stop()


@pytest.fixture
def client(request, shared_server) -> Client:
    """A client of the server that the test's mark ``served`` describes, which others may have used before."""
    return shared_server.client(Configuration.of(request.node))


@pytest.fixture
def last_client(client, shared_server) -> Iterator[Client]:
    """A client of such a server that nobody uses afterwards: the test may stop and kill it."""
    yield client
    shared_server.stop()


@pytest.fixture
def serve(tmp_path_factory) -> Iterator[Callable[..., ApiServer]]:
    """``serve(checkpoint, *arguments)``: a running server of the test's own; all are stopped when it ends."""
    servers = []

    def start(checkpoint: Path, *arguments: str, **environment: str) -> ApiServer:
        log = tmp_path_factory.mktemp('server') / 'log'
        server = ApiServer(checkpoint, *arguments, log=log, environment=environment, timeout=HANG)
        servers.append(server)
        return server.__enter__()

    yield start
    for server in servers:
        server.stop()
