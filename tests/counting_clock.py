"""A clock that counts function calls of the thread that reads it: the same work takes the same time on any machine."""

import sys
from typing import Any

CALLS_PER_SECOND = 1000

_calls = 0


def _count(frame: Any, event: str, argument: Any) -> None:
    global _calls
    _calls += event in ('call', 'c_call')


def read() -> float:
    """Seconds, to be had by ``--benchmark-timer=counting_clock.read``.

    Each reading starts the counting, which pytest-benchmark stops before it times something.
    """
    sys.setprofile(_count)
    return _calls / CALLS_PER_SECOND
