"""A Ray cluster of the tests' own on this machine, with a token, and encoders in it."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.authentication_test_utils import reset_auth_token_state

from lmdeploy_vico.cpu.cluster import _no_limit_of_devices
from lmdeploy_vico.options import Options
from lmdeploy_vico.stage.remote.command import Encoders, Plan

CORES = 8  # that Ray counts; an encoder takes one
GPUS = 2  # logical ones


@contextlib.contextmanager
def own_cluster(home: Path) -> Iterator[str]:
    """A cluster of one node, which this process and its children are in; its address.

    No test uses one that happens to run here.
    """
    (home / 'token').write_text('0' * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('RAY_AUTH_MODE', 'token')
        patch.setenv('RAY_AUTH_TOKEN_PATH', str(home / 'token'))
        patch.delenv('RAY_ADDRESS', raising=False)
        reset_auth_token_state()  # Ray reads its environment when it is imported
        with _no_limit_of_devices():
            ray.init(
                address='local', num_cpus=CORES, num_gpus=GPUS, include_dashboard=False, object_store_memory=2**28,
                log_to_driver=False, configure_logging=False,
            )  # fmt: skip
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()
    reset_auth_token_state()


def started(address: str, checkpoint: Path, number: int) -> Encoders:
    """So many encoders of a checkpoint, ready."""
    encoders = Encoders(Plan(checkpoint, False, number, address, False, Options(cache_bytes=2**26)))
    encoders.start()
    encoders.watch(_Ready(encoders, number))
    return encoders


class _Ready(threading.Event):
    """Ends a watch when all encoders are ready."""

    def __init__(self, encoders: Encoders, number: int) -> None:
        super().__init__()
        self._encoders, self._number = encoders, number

    def wait(self, timeout: Any = None) -> bool:
        if len(self._encoders.ready) == self._number:
            self.set()
        return super().wait(timeout)
