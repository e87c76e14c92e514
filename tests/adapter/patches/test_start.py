"""The orders of events in which LMDeploy's engine used to die while it started, forced one by one."""

import importlib
import inspect
import os
import subprocess
import sys
import threading
from multiprocessing.managers import ConditionProxy, SyncManager
from types import SimpleNamespace

import lmdeploy.pytorch.engine
import pytest
from lmdeploy.pytorch.engine.mp_engine import zmq_engine, zmq_rpc
from ports import given_by_chance
from torch.distributed import TCPStore
from waiting import HANG

from lmdeploy_vico.adapter.patches import start
from lmdeploy_vico.cpu import selection

PORT = 4711


class UnansweredCondition(threading.Condition):
    """Once the port is published, lets the server have the lock, and never answers the release that gave it away."""

    def __init__(self):
        super().__init__()
        unlock, self._published = self.release, False

        def release():
            published, self._published = self._published, False
            unlock()
            if published:
                threading.Event().wait()  # the manager is shut down before it comes to answer

        self.release = release

    def notify(self, n=1):
        super().notify(n)
        self._published = True


class UnansweringManager(SyncManager):
    pass


UnansweringManager.register('Condition', UnansweredCondition, ConditionProxy)


class EngineThread(threading.Thread):
    """Stands in for the engine's process: the same calls to the manager, over a connection of its own."""

    def __init__(self, target, args, kwargs, name):
        super().__init__(name=name, daemon=True)
        self._call = lambda: target(*args, **kwargs)
        self.error = None

    def run(self):
        try:
            self._call()
        except BaseException as error:
            self.error = error


class BuiltError(Exception):
    """The engine process came to building its engine."""


def start_engine(monkeypatch, mp_proc):
    """What ends the engine process after LMDeploy's own handshake, in which the manager is gone a moment too early."""

    def build(model_path, engine_config, **kwargs):
        raise BuiltError

    def manager():
        started = UnansweringManager()
        started.start()
        return started

    monkeypatch.setattr(zmq_engine.ZMQMPEngine, '_mp_proc', staticmethod(mp_proc))
    monkeypatch.setattr(zmq_engine.mp, 'Manager', manager)
    monkeypatch.setattr(zmq_engine.mp, 'get_context', lambda method: SimpleNamespace(Process=EngineThread))
    monkeypatch.setattr(zmq_rpc, 'AsyncRPCServer', lambda: SimpleNamespace(port=PORT))
    monkeypatch.setattr(lmdeploy.pytorch.engine, 'Engine', SimpleNamespace(from_pretrained=build))
    engine = zmq_engine.ZMQMPEngine.__new__(zmq_engine.ZMQMPEngine)
    engine._start_mp_proc('model')
    assert engine.port == PORT
    engine.proc.join(timeout=HANG)
    return engine.proc.error


@pytest.mark.busy
def test_the_manager_goes_before_it_has_answered(monkeypatch):
    monkeypatch.setattr(selection, 'has_cuda', lambda: pytest.fail('CUDA and CPU are alike here'))
    assert isinstance(start_engine(monkeypatch, zmq_engine.ZMQMPEngine._mp_proc), BuiltError)


@pytest.mark.busy
def test_lmdeploy_still_dies_of_it(monkeypatch):
    """When this fails, the patch can go."""
    unpatched = inspect.unwrap(zmq_engine.ZMQMPEngine._mp_proc)
    assert isinstance(start_engine(monkeypatch, unpatched), EOFError | OSError)


def test_other_errors_are_raised():
    class Condition:
        def __enter__(self):
            return 5

        def __exit__(self, kind, error, traceback):
            raise RuntimeError('cannot release un-acquired lock')

        def notify(self):
            return 6

    condition = start.LastRelease(Condition())
    assert condition.notify() == 6
    with pytest.raises(RuntimeError, match='un-acquired'), condition as entered:
        assert entered == 5
    Condition.__exit__ = lambda *details: (_ for _ in ()).throw(EOFError())
    with pytest.raises(KeyError), condition:
        raise KeyError


def let_go(port):
    """Close the socket that holds ``port``."""
    [holder] = [one for one in start._held if one.getsockname()[1] == port]
    start._held.remove(holder)
    holder.close()


@pytest.fixture
def lmdeploys_port(monkeypatch):
    """``lmdeploys_port(executor)``: the port that LMDeploy's executor of this kind chooses for its group."""
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')  # put back afterwards, whatever the executor sets
        monkeypatch.delenv(name)
    chosen = []

    def choose(executor):
        module = importlib.import_module(f'lmdeploy.pytorch.engine.executor.{executor}_executor')
        if executor == 'ray':
            chosen.append(module._get_master_port())
        else:
            module.MPExecutor.setup_master_addr()
            chosen.append(int(os.environ['MASTER_PORT']))
        return chosen[-1]

    yield choose
    for port in chosen:
        let_go(port)


@pytest.mark.busy
@pytest.mark.parametrize('executor', ['mp', 'ray'])
def test_the_port_of_a_group_is_kept_for_it(lmdeploys_port, executor):
    port = lmdeploys_port(executor)
    assert not given_by_chance(port)
    for libuv in (True, False):  # both of PyTorch's servers still get it
        first = TCPStore('127.0.0.1', port, world_size=2, is_master=True, wait_for_workers=False, use_libuv=libuv)
        second = TCPStore('127.0.0.1', port, world_size=2, is_master=False, use_libuv=libuv)
        first.set('met', 'here')
        assert second.get('met') == b'here'
        del first, second


def test_a_port_that_lmdeploy_has_found_may_be_given_away():
    """When this fails, the patch can go."""
    from lmdeploy.pytorch.engine.executor.dist_utils import find_available_port

    # Some program of this machine may have been faster.
    assert any(given_by_chance(find_available_port()) for _ in range(5))


ATTACHED = """
import lmdeploy.pytorch.engine.mp_engine.zmq_engine as engine
import lmdeploy.pytorch.engine.executor.mp_executor as executor
print(hasattr(engine.ZMQMPEngine._mp_proc, '__wrapped__'), hasattr(executor.find_available_port, '__wrapped__'))
"""


@pytest.mark.parametrize('mode, attached', [('1', True), ('cpu', True), ('0', False)])
def test_attached_wherever_the_plugin_is(mode, attached):
    done = subprocess.run(
        [sys.executable, '-c', ATTACHED],
        env={**os.environ, 'LMDEPLOY_VICO': mode},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.stdout.split() == [str(attached)] * 2, done.stderr
