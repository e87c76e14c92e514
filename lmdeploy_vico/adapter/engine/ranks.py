"""The processes of tensor-parallel ranks: they have their shared memory, and the engine ends when one of them does.

Without it the other ranks, and every request, would wait for it for ever.
"""

import asyncio
import contextlib
import errno
import logging
import os
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Iterator
from contextvars import ContextVar
from multiprocessing import connection, util
from pathlib import Path
from typing import Any

from lmdeploy_vico.adapter.engine.ending import end_engine
from lmdeploy_vico.adapter.hf_config import VicoChatConfig

logger = logging.getLogger(__name__)

POLL = 0.01  # seconds
PATIENCE = 5.0  # seconds, in which Ray finds room for ranks where there is some
SHARED_MEMORY = Path('/dev/shm')
_placing: ContextVar[bool] = ContextVar('placing', default=False)
_closed: 'weakref.WeakSet[Any]' = weakref.WeakSet()  # those that are meant to end


def runs_vico(model_config: Any) -> bool:
    """Return whether LMDeploy's model config is that of a ViCO checkpoint's language model."""
    return isinstance(getattr(model_config, 'hf_config', None), VicoChatConfig)


def reserve_buffers(*names: str) -> None:
    """Take the shared memory of LMDeploy's buffers now: a page that is missing later ends whoever writes to it.

    Raises:
        OSError: there is no room; the text says what to do.
    """
    for name in names:
        file = os.open(SHARED_MEMORY / name, os.O_RDWR)
        try:
            size = os.fstat(file).st_size
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            text = (
                f'{SHARED_MEMORY} is full: each tensor-parallel rank needs {size >> 20} MiB of it, and the engine as '
                'much again. Make it larger (docker run --shm-size).'
            )
            logger.critical(text)
            raise OSError(error.errno, text) from None
        finally:
            os.close(file)


def watch_rank(rank: Any) -> None:
    """Watch a process of the ``mp`` executor's, which has been started, in a thread of its own.

    LMDeploy's ranks end with status 0 at SIGTERM, whoever sends it, and also when they have failed.

    Args:
        rank: LMDeploy's ``ExecutorProc``.
    """
    process = rank._proc
    # When this process ends in order, multiprocessing ends its daemons, ranks among them; this is called before.
    util.Finalize(rank, rank_may_end, args=(rank,), exitpriority=0)

    def watch() -> None:
        connection.wait([process.sentinel])
        while process.exitcode is None:  # its descriptors are closed a little before it has ended
            time.sleep(POLL)
        if rank not in _closed:
            end_engine(f'the process of rank {rank.proc_id} has ended')

    threading.Thread(target=watch, name=f'vico-rank-{rank.proc_id}', daemon=True).start()


def end_with_steps(worker: Any) -> None:
    """End the process of a rank of the ``mp`` executor's when what computes its steps has failed.

    Nobody awaits these tasks there: the engine would wait for the outputs of their steps for ever.

    Args:
        worker: LMDeploy's wrapper of a model agent, which has been started.
    """

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _end_rank(error)

    for task in worker.model_agent.tasks:
        task.add_done_callback(ended)


async def call_in_rank(calling: Awaitable[None]) -> None:
    """Call a method of a rank of the ``mp`` executor's, and end the rank's process when it fails."""
    try:
        await calling
    except Exception as error:
        _end_rank(error)
        raise


def _end_rank(error: BaseException) -> None:
    # In a line: where another rank was killed, the steps of the others fail, too, and say nothing new.
    [*_, place] = traceback.extract_tb(error.__traceback__)
    what, _, _ = str(error).partition('\n')
    end_engine(f'a rank has failed ({type(error).__name__}: {what}, in {place.filename}:{place.lineno})')


def rank_may_end(rank: Any) -> None:
    """Note that the executor is about to end a rank's process."""
    _closed.add(rank)


@contextlib.contextmanager
def placing_ranks() -> Iterator[None]:
    """Inside, the ranks of a ViCO model are given their places by Ray."""
    token = _placing.set(True)
    try:
        yield
    finally:
        _placing.reset(token)


def say_what_ray_lacks(group: Any) -> None:
    """Say what a Ray cluster lacks that does not find room for ranks soon; LMDeploy waits on, for half an hour.

    A cluster may grow meanwhile, and others may leave it, so it is no error yet.

    Args:
        group: Ray's placement group, with a bundle for each rank.
    """
    import ray

    if not _placing.get() or ray.wait([group.ready()], timeout=PATIENCE)[0]:
        return
    there, free = (resources.get('GPU', 0) for resources in (ray.cluster_resources(), ray.available_resources()))
    ranks = len(group.bundle_specs)
    logger.warning(
        'Ray has no room for %d ranks yet, each of which takes a GPU, the first one on this node (%s): its cluster has '
        '%g GPUs, of which %g are free. The server waits for half an hour. Add nodes, or end what holds GPUs; "ray '
        'status" lists them. With fewer ranks, start the server again with a lower --tp.',
        *(ranks, ray.util.get_node_ip_address(), there, free),
    )


async def wait_with_workers(workers: list[Any], waiting: Awaitable[None]) -> None:
    """Wait as the Ray executor does while it serves, and end the engine when one of its workers has died.

    Args:
        workers: handles of the actors, rank by rank.
        waiting: LMDeploy's own waiting, which passes over dead workers.
    """
    watches = [asyncio.ensure_future(_watch_worker(rank, worker)) for rank, worker in enumerate(workers)]
    try:
        await waiting
    finally:
        for watch in watches:
            watch.cancel()


async def _watch_worker(rank: int, worker: Any) -> None:
    import ray

    try:
        await worker.wait_tasks.remote()  # until the worker is stopped
    except ray.exceptions.RayActorError:
        # The other workers wait for the dead one. Ray ends them with this process, but later.
        end_engine(f"Ray's worker of rank {rank} has ended", before=ray.shutdown)
    except ray.exceptions.RayError:
        pass  # the worker has failed and is there: LMDeploy waits for the same and ends its loop
