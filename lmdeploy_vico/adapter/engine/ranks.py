"""Ends an engine when the process of one of its tensor-parallel ranks has ended by itself.

The other ranks, and every request, would wait for it for ever.
"""

import logging
import multiprocessing
import os
import threading
import weakref
from multiprocessing import connection
from typing import Any

from lmdeploy_vico.adapter.hf_config import VicoChatConfig

logger = logging.getLogger(__name__)

EXIT_STATUS = 1
_closed: 'weakref.WeakSet[Any]' = weakref.WeakSet()  # those that are meant to end


def watch_rank(rank: Any, model_config: Any) -> None:
    """Watch a rank's process, which has been started, in a thread of its own, if it runs a ViCO model.

    Args:
        rank: LMDeploy's ``ExecutorProc``.
        model_config: LMDeploy's, which the rank was started with.
    """
    if not isinstance(getattr(model_config, 'hf_config', None), VicoChatConfig):
        return
    process = rank._proc

    def watch() -> None:
        connection.wait([process.sentinel])
        if rank in _closed or process.exitcode == 0:  # a rank that fails ends well, and has told the executor
            return
        logger.critical('the process of rank %d has ended: the engine cannot go on', rank.proc_id)
        # In a process that multiprocessing did not start the engine is a part of somebody's program.
        if multiprocessing.parent_process() is not None:
            os._exit(EXIT_STATUS)

    threading.Thread(target=watch, name=f'vico-rank-{rank.proc_id}', daemon=True).start()


def rank_may_end(rank: Any) -> None:
    """Note that the executor is about to end a rank's process."""
    _closed.add(rank)
