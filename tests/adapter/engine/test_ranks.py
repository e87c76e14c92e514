"""The shared memory and the processes of tensor-parallel ranks."""

import asyncio
import errno
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from multiprocessing import util
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace

import pytest
import ray
import torch
from ray_cluster import own_cluster
from waiting import HANG

from lmdeploy_vico.adapter.engine import ending, ranks


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
def rank(ended, monkeypatch):
    """``rank(code)``: a rank whose process has ended with it, and whether the engine was ended."""

    def run(code, meant=False, in_engine=True):
        if not in_engine:
            monkeypatch.setattr(ending, '_started_by_lmdeploy', [])
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


@pytest.mark.parametrize('code', [pytest.param(9, id='killed'), pytest.param(0, id='told to by SIGTERM')])
def test_a_rank_that_ends_by_itself_ends_the_engine(rank, caplog, code):
    with caplog.at_level(logging.CRITICAL):
        assert rank(code) == [1]
    assert 'the process of rank 3 has ended' in caplog.text


@pytest.mark.parametrize('code', [0, 9])
def test_a_rank_that_is_meant_to_end_does_not(rank, caplog, code):
    with caplog.at_level(logging.CRITICAL):
        assert rank(code, meant=True) == []
    assert not caplog.records


def test_ranks_that_end_with_an_engine_that_ends_in_order_are_no_news():
    """Multiprocessing ends the daemons of a process that ends, as LMDeploy's ranks are."""
    engine = multiprocessing.get_context('spawn').Process(target=an_engine)
    engine.start()
    engine.join(HANG)
    assert engine.exitcode == 0  # and not that of an engine that has lost a rank


def an_engine():
    process = multiprocessing.get_context('spawn').Process(target=signal.pause, daemon=True)
    process.start()
    ranks.watch_rank(Rank(process))
    [watch] = [thread for thread in threading.enumerate() if thread.name == 'vico-rank-3']
    # After the daemons have been ended: whoever watches has its say.
    util.Finalize(None, watch.join, args=(HANG,), exitpriority=-1)


def test_the_engine_of_a_pipeline_leaves_its_program_alone(rank, caplog):
    with caplog.at_level(logging.CRITICAL):
        assert rank(9, in_engine=False) == []
    assert 'the process of rank 3 has ended' in caplog.text


def run_step(step):
    """The started worker of a rank, whose model computes this step, until it has ended."""

    async def run():
        task = asyncio.ensure_future(step())
        ranks.end_with_steps(SimpleNamespace(model_agent=SimpleNamespace(tasks={task})))
        await asyncio.wait([task])

    asyncio.run(run())


async def lacks_memory():
    raise torch.OutOfMemoryError('CUDA out of memory.')


async def is_stopped():
    raise asyncio.CancelledError


async def is_done():
    pass


def test_a_step_that_fails_ends_its_rank(ended, caplog):
    with caplog.at_level(logging.ERROR):
        run_step(lacks_memory)
    assert ended == [1]
    said = rf'a rank has failed \(OutOfMemoryError: CUDA out of memory., in {__file__}:\d+\): the engine cannot go on'
    assert re.search(said, caplog.text) and 'Traceback' not in caplog.text


@pytest.mark.parametrize('step', [is_stopped, is_done])
def test_a_step_that_does_not_fail_ends_nothing(ended, step):
    run_step(step)
    assert not ended


def test_a_call_that_fails_ends_its_rank(ended):
    with pytest.raises(torch.OutOfMemoryError):
        asyncio.run(ranks.call_in_rank(lacks_memory()))
    assert ended == [1]
    asyncio.run(ranks.call_in_rank(is_done()))
    assert ended == [1]


class Workers:
    """Ray's handles of two workers, whose ``wait_tasks`` end when the test says so."""

    def __init__(self):
        self.waits = [asyncio.get_running_loop().create_future() for _ in range(2)]
        self.handles = [
            SimpleNamespace(wait_tasks=SimpleNamespace(remote=lambda wait=wait: wait)) for wait in self.waits
        ]


@pytest.fixture
def shut(monkeypatch):
    """How often Ray was shut down."""
    shut = []
    monkeypatch.setattr(ray, 'shutdown', lambda: shut.append(True))
    return shut


def test_a_worker_of_ray_that_dies_ends_the_engine(ended, shut, caplog):
    async def run():
        workers, serving = Workers(), asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(ranks.wait_with_workers(workers.handles, serving))
        workers.waits[1].set_exception(ray.exceptions.ActorDiedError())
        while not ended:
            await asyncio.sleep(0)
        serving.set_result(None)
        await waiting

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(asyncio.wait_for(run(), HANG))
    assert ended == [1] and shut == [True]
    assert "Ray's worker of rank 1 has ended: the engine cannot go on" in caplog.text


def test_workers_that_are_stopped_or_fail_are_left_to_lmdeploy(ended, shut, caplog):
    async def run():
        workers, serving = Workers(), asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(ranks.wait_with_workers(workers.handles, serving))
        await asyncio.sleep(0)  # until they are waited for
        workers.waits[0].set_result(None)
        workers.waits[1].set_exception(ray.exceptions.RayTaskError('wait_tasks', '', ValueError()))
        serving.set_exception(ValueError('as LMDeploy raises it'))
        await waiting

    with pytest.raises(ValueError, match='as LMDeploy raises it'), caplog.at_level(logging.CRITICAL):
        asyncio.run(asyncio.wait_for(run(), HANG))
    assert not ended and not shut and not caplog.records


@pytest.mark.slow
def test_a_cluster_without_room_is_described(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ranks, 'PATIENCE', 1.0)
    with own_cluster(tmp_path):
        group = ray.util.placement_group([{'GPU': 1.0}] * 3)
        ranks.say_what_ray_lacks(group)  # somebody else's
        assert not caplog.records
        with ranks.placing_ranks():
            ranks.say_what_ray_lacks(group)
        [record] = caplog.records
        assert 'no room for 3 ranks yet' in record.message and 'has 2 GPUs, of which 2 are free' in record.message
        caplog.clear()
        with ranks.placing_ranks():
            ranks.say_what_ray_lacks(ray.util.placement_group([{'CPU': 1.0}] * 2))  # there is room
        assert not caplog.records
