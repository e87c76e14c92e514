"""Memory for what clients send: counted before it is taken, for all requests together.

A request that finds no room is refused; it does not wait. Two requests that hold memory and wait for more could wait
for each other.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lmdeploy_vico.media.errors import MediaBusyError, MediaError


class MemoryBudget:
    """Memory for all requests. Safe to use from several threads.

    Args:
        limit: bytes, None for any number.

    Attributes:
        taken: bytes that are counted now.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.taken = 0
        self.lock = threading.Lock()


class MemoryShare:
    """What one request takes of the budget.

    All of it is given back at once, when the last block that uses it has ended. Some work cannot be interrupted, and
    goes on for a while after a client has left.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._size = self._users = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give nothing back before this block ends."""
        with self._budget.lock:
            self._users += 1
        try:
            yield
        finally:
            with self._budget.lock:
                self._users -= 1
                if not self._users:
                    self._budget.taken -= self._size
                    self._size = 0

    def take(self, size: int) -> None:
        """Count ``size`` more bytes; only inside of :meth:`in_use`, as nothing would give them back.

        Raises:
            MediaError: the request alone exceeds the limit.
            MediaBusyError: together with the other requests, it exceeds the limit.
        """
        budget = self._budget
        with budget.lock:
            if budget.limit is not None:
                if self._size + size > budget.limit:
                    raise MediaError(
                        f'The request, with its images and videos decoded, takes at least {self._size + size} bytes of '
                        f'memory, more than the limit of {budget.limit} (option max_decoded_bytes).'
                    )
                if budget.taken + size > budget.limit:
                    raise MediaBusyError(
                        f'Requests take {budget.taken} bytes of memory, and {size} more would exceed the limit of '
                        f'{budget.limit} (option max_decoded_bytes). Try again later.'
                    )
            assert self._users, 'memory is taken by nobody'
            budget.taken += size
            self._size += size

    @contextmanager
    def for_a_while(self) -> Iterator[Callable[[int], None]]:
        """Yield a :meth:`take` whose bytes are given back at the end of the block."""
        size = 0

        def take(more: int) -> None:
            nonlocal size
            self.take(more)
            size += more

        with self.in_use():
            try:
                yield take
            finally:
                self.give_back(size)

    def give_back(self, size: int) -> None:
        """Count ``size`` bytes less: a part that was needed for a while only."""
        with self._budget.lock:
            self._budget.taken -= size
            self._size -= size
