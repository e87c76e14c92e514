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
        self.changed = threading.Condition()


class MemoryShare:
    """What one request takes of the budget.

    All of it is given back at once, when the last block that uses it has ended. Some work cannot be interrupted, and
    goes on for a while after a client has left.

    Args:
        beside: another share of the same request, which has to fit beside this one.
    """

    def __init__(self, budget: MemoryBudget, beside: 'MemoryShare | None' = None) -> None:
        self._budget, self._beside = budget, beside
        self._size = self._passing = self._users = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give nothing back before this block ends."""
        with self._budget.changed:
            self._users += 1
        try:
            yield
        finally:
            with self._budget.changed:
                self._users -= 1
                if not self._users:
                    self._budget.taken -= self._size
                    self._size = self._passing = 0
                    self._budget.changed.notify_all()

    def take(self, size: int, passing: int = 0, wait: bool = False) -> None:
        """Count ``size`` more bytes; only inside of :meth:`in_use`, as nothing would give them back.

        Args:
            size: bytes.
            passing: so many of them will be given back soon, whatever else happens.
            wait: whether to wait for what the request itself gives back soon, if there is no room without it.

        Raises:
            MediaError: the request alone exceeds the limit.
            MediaBusyError: together with the other requests, it exceeds the limit.
        """
        assert self._users, 'memory is taken by nobody'
        with self._budget.changed:
            while (problem := self._problem(size)) is not None:
                if not (wait and self._passing):
                    raise problem
                self._budget.changed.wait()
            self._budget.taken += size
            self._size += size
            self._passing += passing

    def _problem(self, size: int) -> MediaError | MediaBusyError | None:
        limit, taken = self._budget.limit, self._budget.taken
        alone = self._size + size + (self._beside._size if self._beside else 0)
        if limit is None or taken + size <= limit:
            return None
        if alone > limit:
            return MediaError(
                f'The request, with its images and videos decoded, takes at least {alone} bytes of memory, more than '
                f'the limit of {limit} (option max_decoded_bytes).'
            )
        return MediaBusyError(
            f'Requests take {taken} bytes of memory, and {size} more would exceed the limit of {limit} (option '
            'max_decoded_bytes). Try again later.'
        )

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

    def give_back(self, size: int, passing: int = 0) -> None:
        """Count ``size`` bytes less, of which ``passing`` had been announced."""
        with self._budget.changed:
            self._budget.taken -= size
            self._size -= size
            self._passing -= passing
            self._budget.changed.notify_all()
