"""How much memory decoded pictures may take.

Memory is counted before a picture's pixels are decoded, and given back when nobody needs them any more. The vision
stage counts tiles, which says nothing about memory: an image of one tile may have 177 million pixels, in a file of half
a megabyte.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lmdeploy_vico.adapter.server.overload import OverloadError


class TooLargeError(ValueError):
    """A request that needs more memory than there is for all of them; LMDeploy answers 400 with the message."""


class PixelBudget:
    """Memory for the decoded pictures of all requests. Safe to use from several threads.

    A request that finds no room is refused; it does not wait. Two requests that hold memory and wait for more could
    wait for each other.

    Args:
        limit: bytes, None for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.taken = 0
        self.lock = threading.Lock()


class PixelShare:
    """What the pictures of one request take of the budget.

    All of it is given back at once, when the request is no longer prepared and the last thread that decodes for it has
    ended. Decoding cannot be interrupted, so it goes on for a while after a client has left.
    """

    def __init__(self, budget: PixelBudget) -> None:
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
        """Count ``size`` more bytes.

        Raises:
            TooLargeError: the request alone exceeds the limit.
            OverloadError: together with the requests that are being prepared, it exceeds the limit.
        """
        budget = self._budget
        with budget.lock:
            if budget.limit is not None:
                if self._size + size > budget.limit:
                    raise TooLargeError(
                        f'Decoded, the images and videos of the request take at least {self._size + size} bytes of '
                        f'memory, more than the limit of {budget.limit} (option max_decoded_bytes).'
                    )
                if budget.taken + size > budget.limit:
                    raise OverloadError(
                        f'Decoded images and videos take {budget.taken} bytes of memory, and {size} more would exceed '
                        f'the limit of {budget.limit} (option max_decoded_bytes). Try again later.'
                    )
            budget.taken += size
            self._size += size
