"""``benchmarks/serving/handover.py``, ``executors.py``: what is received is timed beside a copy of as many bytes."""

import multiprocessing
import pickle
import threading
from functools import partial

import pytest
import zmq

from benchmarks.serving import executors, handover
from benchmarks.serving.prompt_tokens import Copier, copy_milliseconds, embeddings

SHAPE = (130, 8)


def test_a_copy_is_one_and_of_the_size_asked_for():
    copier = Copier()
    for size in (2**20, 2**20, 5):
        assert copier(size) >= 0
        assert len(copier.target) == size and copier.target.all()
        copier.target[:] = 0
    assert copy_milliseconds([0.003, 0.001, 0.004]) == {'median': 3.0, 'least': 1.0}


@pytest.fixture
def sender(monkeypatch):
    """``sender(way)``: a socket to an engine in a thread of this process, whose memory stays as it is."""
    opened, stops = zmq.Context(), []
    monkeypatch.setattr(handover.Way, 'enter_process', lambda way: None)

    def connect(name):
        ours, theirs = multiprocessing.Pipe()
        engine = threading.Thread(target=handover.engine, args=(name, theirs), daemon=True)
        engine.start()
        socket = opened.socket(zmq.DEALER)
        socket.connect(f'tcp://localhost:{ours.recv()}')
        stops.append((socket, engine))
        return socket

    yield connect
    for socket, engine in stops:
        socket.send(pickle.dumps(None))
        engine.join()
        socket.close()
    opened.term()


@pytest.mark.parametrize('name', ['tensors', 'spans', 'shared memory'])
def test_the_engine_copies_once_a_turn(name, sender, monkeypatch, capsys):
    copied = []
    monkeypatch.setattr(Copier, '__call__', lambda copier, size: copied.append(size) or 0.25)
    times = handover.send(sender(name), handover.ways(cuda=False)[name], embeddings(*SHAPE), 3, check=True)
    assert copied == [embeddings(*SHAPE).nbytes], 'the tokens, whatever the message has'
    assert [one['copy'] for one in times] == [None, None, 0.25], 'with nothing left to be received'
    row = handover.row(name, times)
    assert row['copy_milliseconds'] == {'median': 250.0, 'least': 250.0}
    handover.show([{'case': 'ten tiles', 'width': SHAPE[1], 'in_flight': 3, **row}])
    shown = capsys.readouterr().out
    assert 'one copy' in shown and '250.00' in shown


def test_a_worker_copies_what_it_takes(monkeypatch, capsys):
    copied = []
    monkeypatch.setattr(executors, 'keep_freed_memory', lambda: None)
    monkeypatch.setattr(Copier, '__call__', lambda copier, size: copied.append(size) or 0.25)
    image = embeddings(*SHAPE)
    taken = [executors.Worker().take(partial(form, image), check=True) for form in (executors.spans, executors.tensors)]
    assert copied == [image.nbytes] * 2
    row = executors.row('spans', [{'send': one['receive'], **one} for one in taken])
    assert row['copy_milliseconds'] == {'median': 250.0, 'least': 250.0}
    executors.show([{'width': SHAPE[1], 'executor': 'pickle', **row}])
    shown = capsys.readouterr().out
    assert 'one copy' in shown and '250.00' in shown
