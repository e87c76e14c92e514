"""Timing for the benchmarks: competitors take turns, so that drift of clocks and neighbours cancels in their ratios."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import torch

QUIET = 0.1  # cores that other processes may use in a turn that counts
PATIENCE = 4  # times the seconds that there are for quiet turns, where others use the machine
FEWEST = 3  # turns of each competitor
TURN = 2e-3  # seconds of a turn of several calls

Work = Callable[[], object]
Item = TypeVar('Item')


# --- what is read ----------------------------------------------------------------------------------------------------


class CudaClock:
    """A clock in seconds, read by the device: what lies between two readings is timed by CUDA events.

    Usable wherever ``time.perf_counter`` is. Where the host launches more slowly than the device works, the host's
    pace counts.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds


def clock() -> Callable[[], float]:
    """Return the clock for this machine."""
    return CudaClock() if torch.cuda.is_available() else time.perf_counter


class Meter:
    """What the calling thread has used since the last reading."""

    def __init__(self) -> None:
        self._last = self._read()

    def __call__(self) -> dict[str, float]:
        """Return seconds by the clock, seconds of a processor, and page faults."""
        last, self._last = self._last, self._read()
        return {key: value - last[key] for key, value in self._last.items()}

    @staticmethod
    def _read() -> dict[str, float]:
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        return {'clock': time.perf_counter(), 'processor': time.thread_time(), 'faults': faults}


class Neighbours:
    """Tells how many cores other processes use, by the kernel's count, which has a resolution of 10 ms."""

    def __init__(self) -> None:
        self._last = self._read()

    def __call__(self) -> float:
        """Return the cores that others used on average since the last call."""
        last, self._last = self._last, self._read()
        now, busy, own = (new - old for new, old in zip(self._last, last, strict=True))
        return max(0.0, busy - own) / max(now, 1e-6)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        with open('/proc/stat') as stat:
            user, nice, system, _, _, irq, softirq, stolen = map(int, stat.readline().split()[1:9])
        busy = (user + nice + system + irq + softirq + stolen) / os.sysconf('SC_CLK_TCK')
        return time.perf_counter(), busy, time.process_time()


# --- turns -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """Seconds of one call, and the cores that other processes used meanwhile; 0 where nobody looked."""

    seconds: float
    elsewhere: float = 0.0


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest round, the number of rounds, and the cores that others used.

    ``elsewhere`` is None where nobody looked.
    """

    median: float
    fastest: float
    slowest: float
    rounds: int
    elsewhere: float | None = None

    @classmethod
    def of(cls, samples: Sequence[float], elsewhere: float | None = None) -> 'Timing':
        return cls(statistics.median(samples), min(samples), max(samples), len(samples), elsewhere)

    def per(self, parts: int) -> 'Timing':
        """Return the timing of one of ``parts`` equal parts."""
        shares = (self.median / parts, self.fastest / parts, self.slowest / parts)
        return Timing(*shares, self.rounds, self.elsewhere)


def take_turns(
    functions: Mapping[str, Work],
    enough: Callable[[Mapping[str, Sequence[Turn]]], bool],
    now: Callable[[], float] = time.perf_counter,
    calls: Mapping[str, int] = MappingProxyType({}),
    neighbours: Callable[[], float] = lambda: 0.0,
) -> dict[str, list[Turn]]:
    """Call the functions one after the other, again and again.

    Args:
        enough: whether the turns so far suffice; asked before every round.
        now: the clock, in seconds.
        calls: of a function in one of its turns (default: one).
        neighbours: says what others used since it was last called.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in functions}
    while not enough(turns):
        for name, function in functions.items():
            repeats = calls.get(name, 1)
            neighbours()
            start = now()
            for _ in range(repeats):
                function()
            took = (now() - start) / repeats
            turns[name].append(Turn(took, neighbours()))
    return turns


def interleaved(functions: Mapping[str, Work], seconds: float = 1.0) -> dict[str, Timing]:
    """Time functions in turns, for about ``seconds`` each.

    A turn is as many calls as take 2 ms, so that neither launches nor the clock's resolution count.
    """
    now = clock()
    calls = {}
    for name, function in functions.items():
        for _ in range(3):
            function()
        start = now()
        function()
        calls[name] = max(1, min(1000, round(TURN / max(now() - start, 1e-7))))
    end = time.perf_counter() + seconds * len(functions)

    def enough(turns: Mapping[str, Sequence[Turn]]) -> bool:
        return time.perf_counter() >= end and min(map(len, turns.values())) >= FEWEST

    turns = take_turns(functions, enough, now, calls)
    return {name: Timing.of([turn.seconds for turn in taken]) for name, taken in turns.items()}


def undisturbed(functions: Mapping[str, Work], seconds: float = 1.0, patience: int = PATIENCE) -> dict[str, Timing]:
    """Time functions that keep many cores busy, in turns of one call, in wall time, for about ``seconds`` each.

    A turn in which other processes use more than QUIET cores does not count, as long as there are three quiet ones; to
    get these, it goes on for up to ``patience`` times as long. ``elsewhere`` is the average over the turns that count.
    """
    for function in functions.values():
        function()
    begun, duration = time.perf_counter(), seconds * len(functions)

    def enough(turns: Mapping[str, Sequence[Turn]]) -> bool:
        passed = time.perf_counter() - begun
        if min(map(len, turns.values())) < FEWEST or passed <= duration:
            return False
        return passed > patience * duration or min(map(_quiet, turns.values())) >= FEWEST

    timings = {}
    for name, taken in take_turns(functions, enough, neighbours=Neighbours()).items():
        quietest = sorted(taken, key=lambda turn: (turn.elsewhere, turn.seconds))[: max(FEWEST, _quiet(taken))]
        elsewhere = statistics.mean(turn.elsewhere for turn in quietest)
        timings[name] = Timing.of([turn.seconds for turn in quietest], elsewhere)
    return timings


def _quiet(turns: Sequence[Turn]) -> int:
    return sum(turn.elsewhere <= QUIET for turn in turns)


def one_at_a_time(
    functions: Mapping[str, Callable[[Item], object]], items: Sequence[Item], warm_up: int
) -> dict[str, list[float]]:
    """Seconds of each function for each item, the functions in turns; the first ``warm_up`` items come twice."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for item in [*items[:warm_up], *items]:
        given = {name: partial(function, item) for name, function in functions.items()}
        for name, [turn] in take_turns(given, lambda turns: all(turns.values())).items():
            seconds[name].append(turn.seconds)
    return {name: taken[warm_up:] for name, taken in seconds.items()}


class Reference:
    """Fixed work that takes turns with what pytest-benchmark times: each call is the setup of one of its rounds.

    Args:
        work: returns when it is done.
        timer: pytest-benchmark's own clock.
        turns: of a round of ours.
        warm_up: calls that come before the first round.
    """

    def __init__(self, work: Work, timer: Callable[[], float], turns: int, warm_up: int) -> None:
        self._work, self._timer, self._turns, self._warm_up = work, timer, turns, warm_up
        self._seconds: list[float] = []
        self._used: list[float] = []
        self._neighbours = Neighbours()

    def __call__(self) -> None:
        done = len(self._seconds) - self._warm_up
        if done >= 0 and done % self._turns == 0:
            self._used.append(self._neighbours())
        begun = self._timer()
        self._work()
        self._seconds.append(self._timer() - begun)

    def rounds(self, seconds: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return, of each round, the median ratio of what was timed to this work, and the cores that others used.

        Args:
            seconds: of all turns of what was timed, without warming up.
        """
        self._used.append(self._neighbours())
        pairs = zip(seconds, self._seconds[self._warm_up :], strict=True)
        ratios = [ours / reference for ours, reference in pairs]
        rounds = [ratios[start : start + self._turns] for start in range(0, len(ratios), self._turns)]
        return [statistics.median(ratios) for ratios in rounds], self._used[1:]  # the first is the warm-up's


# --- on a GPU --------------------------------------------------------------------------------------------------------


def rotating(function: Callable[[int], object], sets: int) -> Callable[[], object]:
    """Return a function that makes a call for each set of data, so that none is still in caches when it comes again."""

    def run() -> None:
        for index in range(sets):
            function(index)

    return run


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """Return the function as one CUDA graph, without the host's launches. Raises if it waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: bytes/s of a large copy (read and written), FLOP/s of a large matrix product."""

    bandwidth: float
    flops: float

    def floor(self, moved: float, flops: float = 0.0) -> float:
        """Return the fewest seconds in which ``moved`` bytes and ``flops`` operations can be done."""
        return max(moved / self.bandwidth, flops / self.flops)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure them on random data, rather than take them from a data sheet."""
    large = device.type == 'cuda'
    source = torch.randn(2**30 if large else 2**25, device=device)
    target = torch.empty_like(source)
    side = 8192 if large else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timings = interleaved({'copy': lambda: target.copy_(source), 'product': lambda: a @ b}, seconds=0.5)
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(moved / timings['copy'].median, 2 * side**3 / timings['product'].median)
