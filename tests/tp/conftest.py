"""Tensor-parallel servers. make test-tp runs them: ten at most, one after the other."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tp import processes
from waiting import HANG

from lmdeploy_vico.launch import ApiServer


@pytest.fixture
def serve_ranks(tmp_path) -> Iterator[Callable[..., ApiServer]]:
    """``serve_ranks(checkpoint, *arguments, **environment)``: a running server; at its end no process may be left."""
    servers: list[ApiServer] = []

    def start(checkpoint: Path, *arguments: str, **environment: str) -> ApiServer:
        server = ApiServer(
            checkpoint,
            *('--model-name', 'vico', *arguments),
            log=tmp_path / f'{len(servers)}.log',
            environment={**processes.OWN_CLUSTER, **environment},
            timeout=HANG,
        )
        servers.append(server)
        return server.__enter__()

    yield start
    for server in servers:
        processes.stop(server)
