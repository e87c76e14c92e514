"""The shared memory and the processes of tensor-parallel ranks."""

import errno
import logging
import multiprocessing
import os
import sys
import threading
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace

import pytest
from waiting import HANG

from lmdeploy_vico.adapter.engine import ranks


def test_shared_memory_is_there_before_it_is_used():
    memory = SharedMemory(create=True, size=2**20)
    try:
        path = ranks.SHARED_MEMORY / memory.name
        assert path.stat().st_blocks == 0
        ranks.reserve_buffers(memory.name)
        assert path.stat().st_blocks * 512 >= 2**20
    finally:
        memory.close()
        memory.unlink()


def test_no_room_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / 'buffer').write_bytes(bytes(2**20))

    def full(file, offset, size):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(ranks, 'SHARED_MEMORY', tmp_path)
    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(OSError, match='is full: each tensor-parallel rank needs 1 MiB of it.*--shm-size'):
        ranks.reserve_buffers('buffer')


@pytest.fixture
def rank(monkeypatch):
    """``rank(code)``: a rank whose process has ended with it, and whether the engine was ended."""
    ended = []
    monkeypatch.setattr(ranks.os, '_exit', ended.append)

    def run(code, meant=False, in_engine=True):
        monkeypatch.setattr(ranks.multiprocessing, 'parent_process', lambda: SimpleNamespace() if in_engine else None)
        process = multiprocessing.get_context('spawn').Process(target=sys.exit, args=(code,))
        one = Rank(process)
        if meant:
            ranks.rank_may_end(one)
        process.start()
        ranks.watch_rank(one)
        [watch] = [thread for thread in threading.enumerate() if thread.name == 'vico-rank-3'] or [None]
        if watch:
            watch.join(HANG)
        process.join(HANG)
        return ended

    return run


class Rank:
    """As LMDeploy's ExecutorProc."""

    proc_id = 3

    def __init__(self, process):
        self._proc = process


def test_a_rank_that_ends_by_itself_ends_the_engine(rank, caplog):
    with caplog.at_level(logging.CRITICAL):
        assert rank(9) == [1]
    assert 'the process of rank 3 has ended' in caplog.text


def test_a_rank_that_ends_well_or_is_meant_to_does_not(rank, caplog):
    with caplog.at_level(logging.CRITICAL):
        assert rank(0) == [] and rank(9, meant=True) == []
    assert not caplog.records


def test_the_engine_of_a_pipeline_leaves_its_program_alone(rank, caplog):
    with caplog.at_level(logging.CRITICAL):
        assert rank(9, in_engine=False) == []
    assert 'the process of rank 3 has ended' in caplog.text
