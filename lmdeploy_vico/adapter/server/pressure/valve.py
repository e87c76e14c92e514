"""How much more is compressed while the language model is overloaded.

The decision is taken once for a request, when it arrives, by what the engine said of itself a moment ago. It rises at
once and falls slowly, in a few steps, so that it neither swings with every prefill nor makes many versions of a picture
for the prefix cache.
"""

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

PERIOD = 0.2  # seconds between two questions to the engine, while requests come
IDLE = 2.0  # seconds after the last request in which the engine is still asked, until it is calm
RELEASE = 10.0  # seconds in which full pressure fades
STEPS = 4  # of the extra share, from none to its bound
KV_FROM, KV_FULL = 0.85, 0.95  # shares of the KV cache in use at which pressure begins, and is full


@dataclass(frozen=True)
class Reading:
    """What the language model has to do.

    Attributes:
        waiting: prompts that are ready and wait for their prefill.
        kv_use: the share of the KV cache in use; 0 where it says nothing.
    """

    waiting: int
    kv_use: float


def pressure(reading: Reading, full_at: int) -> float:
    """Return the pressure, from 0 to 1: that of waiting prompts or of the KV cache, whichever is higher.

    Args:
        reading: of the engine.
        full_at: waiting prompts at which it is full; it begins above half as many.
    """
    waiting = _ramp(reading.waiting, full_at / 2, full_at)
    return max(waiting, _ramp(reading.kv_use, KV_FROM, KV_FULL))


def eased(before: float, now: float, seconds: float) -> float:
    """Return the pressure that counts: it follows a rise at once, and a fall by 1 in ``RELEASE`` seconds."""
    return max(now, before - seconds / RELEASE, 0.0)


def extra_share(pressure: float, most: float) -> float:
    """Return the share of a request's tiles to compress beyond its own compression: a step from 0 to ``most``."""
    return most * math.ceil(pressure * STEPS) / STEPS


def _ramp(value: float, begin: float, end: float) -> float:
    return min(max((value - begin) / (end - begin), 0.0), 1.0)


class Valve:
    """Decides for each request of a server. Used in its event loop only.

    Args:
        most: the bound of the extra share.
        full_at: as for :func:`pressure`.
        read: asks the engine.
        clock: seconds.
        pause: waits for seconds.
    """

    def __init__(
        self,
        most: float,
        full_at: int,
        read: Callable[[], Awaitable[Reading]],
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._most, self._full_at, self._read = most, full_at, read
        self._clock, self._pause = clock, pause
        self._pressure, self._read_at, self._decided_at = 0.0, clock(), clock()
        self._watching: asyncio.Task[None] | None = None
        self._answered = True

    def decide(self) -> float:
        """Return the extra share for a request that arrives now; never waits for the engine."""
        self._decided_at = self._clock()
        if self._watching is None or self._watching.done():
            # In a context of its own: it outlives the request.
            self._watching = contextvars.Context().run(asyncio.ensure_future, self._watch())
        return extra_share(self._after(0.0), self._most)

    def _after(self, pressure: float) -> float:
        return eased(self._pressure, pressure, self._clock() - self._read_at)

    async def _watch(self) -> None:
        """Ask the engine again and again, until it is calm and no request has come for a while."""
        while True:
            self._pressure = self._after(await self._current())
            self._read_at = self._clock()
            if not self._pressure and self._clock() - self._decided_at > IDLE:
                return
            await self._pause(PERIOD)

    async def _current(self) -> float:
        """The pressure now; none where the engine does not say, of which the first time in a row is logged."""
        try:
            current = pressure(await self._read(), self._full_at)
        except Exception as error:  # what is wrong with the engine is said where requests need it
            if self._answered:
                logger.warning('pressure_compression does nothing while the engine does not tell its load: %r', error)
            self._answered = False
            return 0.0
        self._answered = True
        return current
