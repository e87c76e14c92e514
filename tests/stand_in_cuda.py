"""Stand-ins for what the vision side uses of CUDA, on a CPU: everything is done at once, and what was called is noted.

An event counts as pending from when it is recorded until the host waits for it or for a stream, since a host that has
not waited for a copy must act as if it were still going on.
"""

import gc
import threading
from contextlib import contextmanager

import torch

CPU = torch.device('cpu')


class StandInCuda:
    """What was called.

    Attributes:
        calls: in this order, with the device that was current.
        pinned: bytes of each pinned allocation.
        room: bytes that can be pinned.
        largest: bytes that can be pinned at once.
        refused: bytes of each pinned allocation that failed.
        pinning: called before each pinned allocation.
    """

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.pinned: list[int] = []
        self.room = self.largest = 1 << 62
        self.refused: list[int] = []
        self.pinning = lambda: None
        self.events: list = []
        self._current = threading.local()
        self._empty = torch.empty

    @property
    def device(self):
        return getattr(self._current, 'device', torch.device('cuda:0'))

    @contextmanager
    def on(self, device):
        before, self._current.device = self.device, device
        try:
            yield
        finally:
            self._current.device = before

    def note(self, *call) -> None:
        self.calls.append((*call, str(self.device)))

    def empty(self, *args, pin_memory=False, **kwargs):
        if not pin_memory:
            return self._empty(*args, **kwargs)
        self.pinning()
        tensor = self._empty(*args, **kwargs)
        if sum(self.pinned) + tensor.nbytes > self.room or tensor.nbytes > self.largest:
            self.refused.append(tensor.nbytes)
            raise RuntimeError('CUDA error: out of memory')
        self.pinned.append(tensor.nbytes)
        return tensor.fill_(255)  # a number that is not one, in every dtype in use

    def synchronized(self) -> None:
        for event in self.events:
            event.pending = False

    @contextmanager
    def graph(self, graph, **options):
        self.note('capture', options.pop('capture_error_mode', 'global'), gc.isenabled())
        assert set(options) == {'stream'}
        with self.stream(options['stream']):
            yield
        self.note('captured')

    @contextmanager
    def stream(self, stream):
        before, self._current.stream = getattr(self._current, 'stream', None), stream
        try:
            yield
        finally:
            self._current.stream = before

    @property
    def current_stream(self):
        return self._current.stream

    def install(self, monkeypatch) -> None:
        cuda = self

        class Stream:
            def __init__(self, device=None, priority=0):
                pass

            def wait_stream(self, other):
                pass

            def wait_event(self, event):
                assert event.recorded

            def synchronize(self):
                cuda.note('synchronize')
                cuda.synchronized()

        class Event:
            def __init__(self, enable_timing=False):
                self.recorded = self.pending = False
                cuda.events.append(self)

            def record(self):
                self.recorded = self.pending = True

            def synchronize(self):
                assert self.recorded
                self.pending = False

            def elapsed_time(self, other):
                assert self.recorded and other.recorded
                return 12.5

        for name, value in {
            'Stream': Stream,
            'Event': Event,
            'CUDAGraph': object,
            'current_stream': Stream,
            'device': self.on,
            'graph': self.graph,
            'stream': self.stream,
            'synchronize': lambda device=None: self.synchronized(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, 'empty', self.empty)
        monkeypatch.setattr(torch.accelerator, 'empty_host_cache', lambda: self.note('empty_host_cache'))

    def encoder(self, encoder):
        """Have an encoder that was made on the CPU believe it is on a CUDA device."""
        from lmdeploy_vico.vision.batches import CudaBatches

        encoder._batches = CudaBatches(encoder.tower, encoder.tile_batch, CPU, graph=False)
        encoder.projection.stream = torch.cuda.Stream()
        return encoder
