"""The processes of tensor-parallel ranks: they have their shared memory, and the engine ends when one of them does.

Without it the other ranks, and every request, would wait for it for ever.
"""

import errno
import logging
import multiprocessing
import os
import threading
import time
import weakref
from multiprocessing import connection
from pathlib import Path
from typing import Any

from lmdeploy_vico.adapter.hf_config import VicoChatConfig

logger = logging.getLogger(__name__)

EXIT_STATUS = 1
POLL = 0.01  # seconds
SHARED_MEMORY = Path('/dev/shm')
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
    """Watch a rank's process, which has been started, in a thread of its own.

    Args:
        rank: LMDeploy's ``ExecutorProc``.
    """
    process = rank._proc

    def watch() -> None:
        connection.wait([process.sentinel])
        while process.exitcode is None:  # its descriptors are closed a little before it has ended
            time.sleep(POLL)
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
