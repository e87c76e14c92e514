"""What a server and its processes take: memory, descriptors, threads, KV blocks, places in queues."""

import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass

import psutil
from prometheus_client.parser import text_string_to_metric_families
from waiting import HANG

from lmdeploy_vico.launch import ApiServer

EVERY = 0.05  # seconds between two looks at the memory
GAUGES = ('lmdeploy:num_requests_running', 'lmdeploy:num_requests_waiting', 'lmdeploy:gpu_cache_usage_perc')


def engine(server: ApiServer) -> psutil.Process:
    [found] = [child for child in psutil.Process(server.pid).children() if 'ZMQMPEngine' in child.name()]
    return found


@dataclass(frozen=True)
class Resources:
    """Of the API process and the engine's: memory in MiB, and what is open; what the engine works on; processes."""

    api_memory: float
    engine_memory: float
    api_files: int
    engine_files: int
    api_threads: int
    engine_threads: int
    processes: int
    gauges: tuple[float, ...]

    @classmethod
    def of(cls, server: ApiServer) -> 'Resources':
        api = psutil.Process(server.pid)
        both = (api, engine(server))
        return cls(
            *(one.memory_info().rss / 2**20 for one in both),
            *(one.num_fds() for one in both),
            *(one.num_threads() for one in both),
            len(api.children(recursive=True)),
            gauges(server.url),
        )

    def more_than(self, rest: 'Resources', **allowed: float) -> dict[str, str]:
        """What is more than at rest, but for so much as is allowed of ``memory`` (MiB) and ``threads``."""
        grown = {}
        for name, now in asdict(self).items():
            then = getattr(rest, name)
            if any(now) if name == 'gauges' else now > then + allowed.get(name.rpartition('_')[2], 0):
                grown[name] = f'{then} -> {now}'
        return grown


def gauges(url: str) -> tuple[float, ...]:
    with urllib.request.urlopen(f'{url}/metrics', timeout=HANG) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        values = {sample.name: sample.value for family in families for sample in family.samples}
    return tuple(values[name] for name in GAUGES)


def at_rest(server: ApiServer, is_rest: Callable[[Resources], bool]) -> Resources:
    """The resources as soon as they are what is waited for, or after a long time."""
    deadline = time.monotonic() + HANG
    while not is_rest(found := Resources.of(server)) and time.monotonic() < deadline:
        time.sleep(EVERY)
    return found


class HighestMemory(threading.Thread):
    """Looks again and again at the memory of the API process and the engine's, in MiB; ``highest`` of each."""

    def __init__(self, server: ApiServer) -> None:
        super().__init__(daemon=True)
        self._processes = {'api': psutil.Process(server.pid), 'engine': engine(server)}
        self.highest = dict.fromkeys(self._processes, 0.0)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(EVERY):
            for name, process in self._processes.items():
                self.highest[name] = max(self.highest[name], process.memory_info().rss / 2**20)

    def __enter__(self) -> 'HighestMemory':
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()
