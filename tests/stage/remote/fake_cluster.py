"""A cluster in this process whose encoders are killed, held, added and removed when a test says so.

Messages are pickled both ways, so that an encoder shares no memory with the stage.
"""

import pickle
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from stage.stand_in import StandInEncoder
from waiting import HANG

from lmdeploy_vico import __version__
from lmdeploy_vico.stage.errors import EncoderGoneError
from lmdeploy_vico.stage.remote.service import EncoderService

FINGERPRINT = 'fedcba9876543210'
TURN = threading.Condition()  # notified whenever a fleet has looked at its cluster


def hello_of(incarnation, **other):
    """What a stand-in says of itself."""
    return {
        'version': __version__, 'checkpoint': FINGERPRINT, 'path': '/checkpoint', 'host': 'here', 'dtype': 'float32',
        'tile_batch': 2, 'device': 'cpu', 'kernels': 'torch', 'speedups': '', 'torch': '2', 'threads': 1,
        'incarnation': incarnation, **other,
    }  # fmt: skip


class FakeAnswer:
    def __init__(self, future):
        self._future = future

    def ready(self, seconds):
        return bool(wait_for([self._future], seconds).done)

    def result(self):
        result = self._future.result(HANG)
        if isinstance(result, Exception):
            raise result
        return pickle.loads(result)


class FakeEncoder:
    """One encoder: a Channel.

    Attributes:
        open: while it is cleared, calls other than ``hello`` wait.
        entered: set when such a call has come.
        calls: how many of each kind have been answered or are waiting.
        received: the tiles that it was sent.
    """

    def __init__(self, name, cache_bytes=2**26, encoder=None, **hello):
        self.name, self._cache_bytes, self._hello = name, cache_bytes, hello
        self.encoder = encoder or StandInEncoder(tile_batch=2)
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()
        self.calls, self.received, self._starts, self._lock = Counter(), 0, 0, threading.Lock()
        self.silent = self.unanswered = False  # whether ``hello`` is not answered, and has not been
        self.start()

    def start(self):
        """Begin anew, with an empty cache."""
        self._starts += 1
        self.incarnation = f'{self.name}-{self._starts}'
        hello = hello_of(self.incarnation, tile_batch=self.encoder.tile_batch, **self._hello)
        self.service = EncoderService(self.encoder, hello, self._cache_bytes)
        self._threads, self._pending = ThreadPoolExecutor(8), set()
        self.dead = False

    def kill(self):
        """End it, with everything that it has been asked."""
        with self._lock:
            self.dead = True
            pending, self._pending = self._pending, set()
        for future in pending:
            if not future.done():
                future.set_result(EncoderGoneError(f'{self.name} was killed.'))
        self.open.set()

    def call(self, method, *arguments):
        future, message = Future(), pickle.dumps(arguments)
        with self._lock:
            if self.dead:
                future.set_result(EncoderGoneError(f'{self.name} is dead.'))
                return FakeAnswer(future)
            self.calls[method] += 1
            self._pending.add(future)
        if method == 'hello' and self.silent:
            self.unanswered = True
        else:
            self._threads.submit(self._answer, self.incarnation, method, message, future)
        return FakeAnswer(future)

    def _answer(self, incarnation, method, message, future):
        if method != 'hello':
            self.entered.set()
            self.open.wait(HANG)
        try:
            arguments = pickle.loads(message)
            if method.startswith('encode'):
                self.received += len(arguments[1])
            result = pickle.dumps(getattr(self.service, method)(*arguments))
        except Exception as error:
            result = error
        with self._lock:
            if incarnation == self.incarnation and future in self._pending:
                self._pending.discard(future)
                future.set_result(result)


class FakeCluster:
    """Attributes: encoders: those that exist, by name; tests change it."""

    name = 'ray:here'

    def __init__(self, *encoders, others=()):
        self.encoders, self._others, self.closed = {one.name: one for one in encoders}, list(others), False

    def find(self):
        return list(self.encoders.values())

    def others(self):
        return self._others

    def close(self):
        self.closed = True


def wait_until(condition):
    """Wait for what a fleet does in one of its next turns."""
    with TURN:
        assert TURN.wait_for(condition, HANG)
