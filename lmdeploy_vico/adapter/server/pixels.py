"""How much memory decoded pictures may take: asked before their pixels are decoded, given back when nobody needs them.

Places in the vision stage are counted in tiles, and say nothing of this: an image may ask for one tile and have 177
million pixels, in a file of half a megabyte.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lmdeploy_vico.adapter.server.overload import OverloadError


class TooLargeError(ValueError):
    """A request that needs more memory than there is for all of them; LMDeploy answers 400 with the message."""


class PixelBudget:
    """Memory for the decoded pictures of all requests. Safe to use from several threads.

    Nobody waits for room: whoever has some and waits for more could wait for somebody who does the same.

    Args:
        limit: bytes, None for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.taken = 0
        self.lock = threading.Lock()


class PixelShare:
    """What the pictures of one request take of the budget.

    It is given back, all at once, when the request is not being prepared any more and the last thread that decoded for
    it has come to its end: decoding cannot be interrupted, and goes on for a while after a client has left.
    """

    def __init__(self, budget: PixelBudget) -> None:
        self._budget = budget
        self._size = self._users = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, nothing is given back, and :func:`charge` and :func:`decoding` know whose pictures these are."""
        with self._budget.lock:
            self._users += 1
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            with self._budget.lock:
                self._users -= 1
                if not self._users:
                    self._budget.taken -= self._size
                    self._size = 0

    def take(self, size: int) -> None:
        """Count ``size`` more bytes.

        Raises:
            TooLargeError: the request alone exceeds the limit.
            OverloadError: it does beside those that are being prepared now.
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


_current: ContextVar[PixelShare | None] = ContextVar('vico_pixels', default=None)


@contextmanager
def decoding() -> Iterator[None]:
    """Around what a thread does for a request, in a copy of its context: until the end its pictures are counted."""
    share = _current.get()
    if share is None:
        yield
        return
    with share.in_use():
        yield


def charge(size: int) -> None:
    """Count bytes that are about to be decoded for the request being prepared, if there is one; see ``take``."""
    share = _current.get()
    if share is not None:
        share.take(size)
