"""Timing for the benchmarks: competitors take turns, so that drift of clocks and neighbours cancels in their ratios."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


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
    """The clock for this machine."""
    return CudaClock() if torch.cuda.is_available() else time.perf_counter


QUIET = 0.1  # cores that other processes may use in a turn that counts
PATIENCE = 4  # times the seconds that there are for quiet turns, where others use the machine


class Neighbours:
    """How many cores other processes use, by the kernel's count, which has a resolution of 10 ms."""

    def __init__(self) -> None:
        self._last = self._read()

    def __call__(self) -> float:
        """The cores that others used on average since the last call."""
        last, self._last = self._last, self._read()
        now, busy, own = (new - old for new, old in zip(self._last, last, strict=True))
        return max(0.0, busy - own) / max(now, 1e-6)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        with open('/proc/stat') as stat:
            user, nice, system, _, _, irq, softirq, stolen = map(int, stat.readline().split()[1:9])
        busy = (user + nice + system + irq + softirq + stolen) / os.sysconf('SC_CLK_TCK')
        return time.perf_counter(), busy, time.process_time()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of so many rounds; the cores others used, where it is known."""

    median: float
    fastest: float
    slowest: float
    rounds: int
    elsewhere: float | None = None

    @classmethod
    def of(cls, samples: Sequence[float], elsewhere: float | None = None) -> 'Timing':
        return cls(statistics.median(samples), min(samples), max(samples), len(samples), elsewhere)

    def per(self, parts: int) -> 'Timing':
        """The same of one of so many equal parts."""
        shares = (self.median / parts, self.fastest / parts, self.slowest / parts)
        return Timing(*shares, self.rounds, self.elsewhere)


def interleaved(functions: dict[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, Timing]:
    """Time functions in turns, for about so many seconds each.

    A turn is as many calls as take 2 ms, so that neither launches nor the clock's resolution count.
    """
    now = clock()
    calls = {}
    for name, function in functions.items():
        for _ in range(3):
            function()
        start = now()
        function()
        calls[name] = max(1, min(1000, round(2e-3 / max(now() - start, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or min(len(taken) for taken in samples.values()) < 3:
        for name, function in functions.items():
            start = now()
            for _ in range(calls[name]):
                function()
            samples[name].append((now() - start) / calls[name])
    return {name: Timing.of(taken) for name, taken in samples.items()}


def undisturbed(
    functions: dict[str, Callable[[], object]], seconds: float = 1.0, patience: int = PATIENCE
) -> dict[str, Timing]:
    """Time functions that keep many cores busy, in turns of one call, in wall time, for about so many seconds each.

    Turns in which other processes use more than QUIET cores do not count, as long as there are three others; for these
    there is so many times the patience. ``elsewhere`` says what others used in those that count, on average.
    """
    for function in functions.values():
        function()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    begun, duration, neighbours = time.perf_counter(), seconds * len(functions), Neighbours()

    def fewest(quiet: bool) -> int:
        return min(sum(not quiet or used <= QUIET for used, _ in taken) for taken in samples.values())

    while True:
        passed = time.perf_counter() - begun
        if fewest(quiet=False) >= 3 and passed > duration and (fewest(quiet=True) >= 3 or passed > patience * duration):
            break
        for name, function in functions.items():
            neighbours()
            start = time.perf_counter()
            function()
            took = time.perf_counter() - start
            samples[name].append((neighbours(), took))
    timings = {}
    for name, taken in samples.items():
        quietest = sorted(taken)[: max(3, sum(used <= QUIET for used, _ in taken))]
        timings[name] = Timing.of([took for _, took in quietest], statistics.mean(used for used, _ in quietest))
    return timings


def rotating(function: Callable[[int], object], sets: int) -> Callable[[], object]:
    """One call for each of so many sets of data, so that none is still in the device's caches when it is used again."""

    def run() -> None:
        for index in range(sets):
            function(index)

    return run


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """The function as one CUDA graph: what it costs without the host's launches. Raises if it waits for the device."""
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
        """The fewest seconds in which so many bytes and operations can be done."""
        return max(moved / self.bandwidth, flops / self.flops)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured rather than taken from a data sheet, on random data."""
    large = device.type == 'cuda'
    source = torch.randn(2**30 if large else 2**25, device=device)
    target = torch.empty_like(source)
    side = 8192 if large else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timings = interleaved({'copy': lambda: target.copy_(source), 'product': lambda: a @ b}, seconds=0.5)
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(moved / timings['copy'].median, 2 * side**3 / timings['product'].median)
