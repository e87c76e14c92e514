"""Ray on machines without CUDA: logical GPUs, of which each rank of an engine takes one, and workers that use none.

Ray counts the GPUs of a machine and gives a worker the numbers of its own. A logical GPU is only a number: it keeps
apart what runs on the processor, as real ones do, so that LMDeploy's Ray executor can be tried without a GPU.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from lmdeploy_vico import log

logger = logging.getLogger(__name__)

# Bytes of shared memory for what the engine hands to its ranks. LMDeploy would take 30 % of the machine's.
OBJECT_STORE = 512 << 20
_VISIBLE = 'CUDA_VISIBLE_DEVICES'
# For workers: no device, whatever there is on a node, and Ray leaves it at that.
WORKER_ENVIRONMENT = {_VISIBLE: '', 'RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES': '1'}


def start(ranks: int, address: str | None = None) -> None:
    """Start a Ray cluster with ``ranks`` logical GPUs in this process, unless there is one to join.

    Args:
        ranks: logical GPUs.
        address: of the cluster to join; None to look where Ray looks (``RAY_ADDRESS``, an earlier ``ray start``).
    """
    import ray

    log.setup()
    if ray.is_initialized():
        return
    try:
        with _no_limit_of_devices():
            ray.init(address, num_cpus=0, num_gpus=ranks, object_store_memory=OBJECT_STORE, include_dashboard=False)
    except ValueError as error:
        if 'existing cluster' not in str(error):
            raise
        logger.info('Ray: ranks (%d) run in the cluster that runs already, each on a logical GPU', ranks)
    else:
        logger.info('Ray: ranks (%d) run in a cluster that was started for them, each on a logical GPU', ranks)


@contextlib.contextmanager
def _no_limit_of_devices() -> Iterator[None]:
    """Ray starts no more logical GPUs than CUDA devices are visible to this process."""
    visible = os.environ.pop(_VISIBLE, None)
    try:
        yield
    finally:
        if visible is not None:
            os.environ[_VISIBLE] = visible


def hide_devices(runtime_env: dict[str, Any]) -> dict[str, Any]:
    """Have the workers of a ``runtime_env`` see no CUDA device."""
    runtime_env['env_vars'] = {**runtime_env.get('env_vars', {}), **WORKER_ENVIRONMENT}
    return runtime_env
