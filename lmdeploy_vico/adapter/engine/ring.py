"""The ring of shared memory in which LMDeploy's ``mp`` executor sends messages to its ranks, for messages of megabytes.

LMDeploy 0.18 cuts a message into packages of 1 MiB. For each it copies all that is left to send, and a rank copies all
that has come so far: for the visual tokens of ten tiles, 20 MiB, that is 200 MiB on either side. It does so in the
engine's loop, which serves nobody meanwhile. Here every byte is copied once on either side, and in a thread.
"""

import asyncio
import pickle
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from lmdeploy_vico.adapter.engine.ending import LAST_ACTS
from lmdeploy_vico.adapter.engine.spans import carries_spans

_rings: set[str] = set()
_locks: 'weakref.WeakKeyDictionary[Any, threading.Lock]' = weakref.WeakKeyDictionary()


def know_rings(*names: str) -> None:
    """Note the shared memory of a ViCO model's rings, in a process that is to write to it or read from it."""
    _rings.update(names)


def is_known(buffer: Any) -> bool:
    """Return whether LMDeploy's ``SharedBuffer`` is a ring of a ViCO model."""
    return buffer.name() in _rings


def packages(buffer: Any, data: Any, receivers: int) -> Iterator[int]:
    """Write a message to a ring, package by package.

    Args:
        buffer: LMDeploy's ``SharedBuffer``.
        data: the message; pickled.
        receivers: mask of the ranks it is for.

    Yields:
        The bytes of each package when it is written. No view of the ring is given away: whoever fails to announce a
        package would keep it, and a ring of which there are views cannot be closed.
    """
    from lmdeploy.pytorch.engine.executor.mp_executor import HEAD_SIZE, SHARED_BLOCK_SIZE

    message = memoryview(pickle.dumps(data, protocol=pickle.HIGHEST_PROTOCOL))
    head = struct.pack('II', len(message), receivers)
    for start in range(0, len(message), SHARED_BLOCK_SIZE):
        part = message[start : start + SHARED_BLOCK_SIZE]
        with buffer.acquire_buf() as package, package:
            package[:HEAD_SIZE] = head
            package[HEAD_SIZE : HEAD_SIZE + len(part)] = part
        yield len(part)


async def call_ranks(executor: Any, message: dict[str, Any], receivers: int) -> list[Any] | None:
    """Call a method on ranks, as ``MPExecutor.collective_rpc_async`` does, without stopping the loop for long.

    Args:
        executor: LMDeploy's ``MPExecutor``.
        message: ``method``, ``args``, ``kwargs`` and ``return_mask``, the mask of the ranks whose results are wanted.
        receivers: mask of the ranks that are called.

    Returns:
        The results rank by rank, None for ranks that were not asked; None if none was.
    """
    lock = lock_of(executor.comm_buf)
    if any(isinstance(one, dict) and carries_spans(one) for one in message['args']) or not lock.acquire(blocking=False):
        await asyncio.to_thread(_send, executor, message, receivers)
    else:
        try:
            executor.comm_buf.send(message, receiver_mask=receivers)
        finally:
            lock.release()
    if not (wanted := message['return_mask']):
        return None
    return [
        await buffer.receive_async() if wanted & (1 << rank) else None for rank, buffer in enumerate(executor.ret_bufs)
    ]


def lock_of(buffer: Any) -> threading.Lock:
    """What keeps messages of threads apart in a ring."""
    return _locks.setdefault(buffer, threading.Lock())


def close_ring(buffer: Any, close: Callable[[], None]) -> None:
    """Close a ring when the thread that sends, if one does, has given up.

    Args:
        buffer: LMDeploy's ``SharedBuffer``.
        close: LMDeploy's own closing, which fails, and leaves the memory behind, while somebody writes.
    """
    buffer.notifier.close()  # whoever waits for the other side is told that it has ended
    lock = lock_of(buffer)
    free = lock.acquire(timeout=LAST_ACTS)
    try:
        close()
    finally:
        if free:
            lock.release()


def _send(executor: Any, message: dict[str, Any], receivers: int) -> None:
    with lock_of(executor.comm_buf):
        executor.comm_buf.send(message, receiver_mask=receivers)
