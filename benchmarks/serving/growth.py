"""What a server's processes take while a benchmark runs, and whether that grows: memory, file descriptors, threads."""

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

WARM_UP = 400  # requests after which a server has its threads, caches and allocators' pools
SAMPLING = 0.5  # seconds between two samples
# A page that processes share, as of the memory in which ranks get their messages, is one page: `pss` halves it for two.
MEMORY = ('pss', 'uss', 'device')
COUNTS = ('file_descriptors', 'threads')
# How much more the last quarter of a run may have than the second one. Memory may grow by the larger of the first two.
SHARE, BYTES, COUNT = 0.02, 30 << 20, 4


@dataclass
class Sampler:
    """Samples a process and its children, and device memory where there is CUDA.

    Attributes:
        pid: of the server's first process; None to look at device memory alone.
        finished: requests, to be counted by whoever sends them.
        samples: ``finished`` then, and totals over the processes; ``processes`` has the memory of each that is its own.
    """

    pid: int | None
    finished: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sample from a thread meanwhile."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(SAMPLING):
                self.samples.append(self._sample())

        thread = threading.Thread(target=run, name='sampler', daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _sample(self) -> dict[str, Any]:
        sample: dict[str, Any] = {'finished': self.finished}
        if self.pid is not None:
            processes = _look_at_all(self.pid)
            sample |= {name: sum(one[name] for one in processes) for name in ('pss', 'uss', *COUNTS)}
            sample['processes'] = {str(one['pid']): one['uss'] for one in processes}
        if torch.cuda.is_available():
            memory = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
            sample['device'] = sum(total - free for free, total in memory)
        return sample

    def medians(self, requests: int) -> list[dict[str, float]]:
        """For each quarter of a run of so many requests, the medians of its samples; empty where there is none."""
        quarters: list[list[dict[str, Any]]] = [[], [], [], []]
        for sample in self.samples:
            quarters[min(4 * sample['finished'] // requests, 3)].append(sample)
        return [
            {name: statistics.median(sample[name] for sample in quarter) for name in self._names()} if quarter else {}
            for quarter in quarters
        ]

    def _names(self) -> list[str]:
        return [name for name in (*MEMORY, *COUNTS) if any(name in sample for sample in self.samples)]

    def judges(self, requests: int) -> bool:
        """Whether a run of so many requests is long enough to tell growth from warming up, and has samples."""
        _, second, _, last = self.medians(requests)
        return requests >= 4 * WARM_UP and bool(second and last)

    def growth(self, requests: int) -> list[str]:
        """A sentence for everything that grew too much from the second quarter to the last; none of too short a run."""
        if not self.judges(requests):
            return []
        _, second, _, last = self.medians(requests)
        return [
            f'{name} grew from {second[name]:.0f} to {last[name]:.0f}.'
            for name in self._names()
            if last[name] > second[name] + (max(SHARE * second[name], BYTES) if name in MEMORY else COUNT)
        ]


def _look_at_all(pid: int) -> list[dict[str, int]]:
    try:
        server = psutil.Process(pid)
        return [one for process in (server, *server.children(recursive=True)) if (one := _look(process))]
    except psutil.Error:  # it has ended
        return []


def _look(process: psutil.Process) -> dict[str, int] | None:
    try:
        memory = process.memory_full_info()
        return {
            'pid': process.pid,
            'pss': memory.pss,
            'uss': memory.uss,
            'file_descriptors': process.num_fds(),
            'threads': process.num_threads(),
        }
    except psutil.Error:  # it has ended in between
        return None
