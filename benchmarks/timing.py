"""Timing for the benchmarks: competitors take turns, so that drift of clocks and neighbours cancels in their ratios."""

import statistics
import time
from collections.abc import Callable
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


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of so many rounds."""

    median: float
    fastest: float
    slowest: float
    rounds: int

    def per(self, parts: int) -> 'Timing':
        """The same of one of so many equal parts."""
        return Timing(self.median / parts, self.fastest / parts, self.slowest / parts, self.rounds)


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
    return {
        name: Timing(statistics.median(taken), min(taken), max(taken), len(taken)) for name, taken in samples.items()
    }


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
