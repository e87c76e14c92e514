"""Ends the engine's process when it can do no more: its server has ended, a rank has, or its own loop has failed.

The server notices, answers its requests with 503, and ends too, so that a supervisor starts another.
"""

import asyncio
import logging
import multiprocessing
import os
import threading
from collections.abc import Awaitable, Callable
from multiprocessing import connection

logger = logging.getLogger(__name__)

EXIT_STATUS = 1
LAST_ACTS = 5.0  # seconds
_started_by_lmdeploy: list[bool] = []  # not empty in a process that LMDeploy has started for a server or an engine


def end_with_parent() -> None:
    """Watch the parent of a process of LMDeploy's; does nothing in a process that multiprocessing did not start."""
    _started_by_lmdeploy.append(True)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(EXIT_STATUS)  # whatever else it does: nobody would hear of it

    threading.Thread(target=watch, name='vico-parent', daemon=True).start()


def end_engine(reason: str, before: Callable[[], None] | None = None) -> None:
    """Say why the engine cannot go on, and end its process at once.

    In a process that LMDeploy did not start the engine is a part of somebody's program, which goes on.

    Args:
        reason: what has happened.
        before: what is done first, for ``LAST_ACTS`` at most.
    """
    logger.critical('%s: the engine cannot go on', reason)
    if not _started_by_lmdeploy:
        return
    if before is not None:
        act = threading.Thread(target=before, name='vico-last-act', daemon=True)
        act.start()
        act.join(LAST_ACTS)
    os._exit(EXIT_STATUS)


async def run_engine_loop(loop: Awaitable[None]) -> None:
    """Run the engine's main loop, and end the process when it fails: no request would be answered any more."""
    try:
        await loop
    except (asyncio.CancelledError, GeneratorExit):
        raise  # LMDeploy stops it, or nobody runs it any more
    except BaseException as error:
        end_engine(f"the engine's loop has failed ({type(error).__name__})")
        raise
