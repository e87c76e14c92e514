"""A stage with many devices: tiles are shared by load, evenly, and none is lost with a device."""

import threading
from contextlib import contextmanager

import pytest
import torch
from stage.stand_in import StandInEncoder, job
from waiting import HANG

from lmdeploy_vico.stage import memory
from lmdeploy_vico.stage.errors import DeviceStartError
from lmdeploy_vico.stage.queue import PendingPrompt, TileQueue
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.stage.tiles import Tile
from lmdeploy_vico.stage.workers.thread import DeviceThread
from lmdeploy_vico.vision.batches import RunningBatch

DEVICES = 8
ROUNDS = 3

pytestmark = pytest.mark.busy


class Batch(RunningBatch):
    """A batch whose features are there when its device is told so."""

    def __init__(self, features, ended):
        super().__init__(features, 0.0)
        self._ended = ended

    def wait(self):
        self._ended()
        return super().wait()


class Device(StandInEncoder):
    """A stand-in that is told when to start and to end a batch, and counts its batches."""

    def __init__(self, started=lambda: None, ended=lambda: None):
        super().__init__()
        self._started, self._ended = started, ended
        self.batches = 0

    def start(self, tiles):
        self._started()
        self.batches += 1
        return Batch(super().start(tiles).wait(), self._ended)


def prompts_of(pictures, number):
    """The jobs of so many prompts of one tile each, all different."""
    image = pictures['coffee']
    return [job(image.crop((index, index, index + 200, index + 200)), 1) for index in range(number)]


def submit_all(stage, jobs):
    """Submit a prompt for each job and wait until all are cut."""
    futures = [stage.submit([one], 'auto') for one in jobs]
    queue = stage._queue
    with queue._changed:
        assert queue._changed.wait_for(lambda: all(None not in prompt.images for prompt in queue._prompts), HANG)
    return futures


def check(futures, jobs, encoder):
    for future, one in zip(futures, jobs, strict=True):
        [image] = future.result(HANG)
        [expected] = encoder.encode([one.image])
        assert torch.equal(image.tokens.embeddings, expected.embeddings.to(torch.bfloat16))


def test_equal_devices_get_equal_shares(encoder, pictures):
    cut, in_step = threading.Event(), threading.Barrier(DEVICES, timeout=HANG)
    devices = [Device(lambda: cut.wait(HANG), in_step.wait) for _ in range(DEVICES)]
    stage = VisionStage(devices, torch.bfloat16, threads=2)
    jobs = prompts_of(pictures, DEVICES * ROUNDS)
    futures = submit_all(stage, jobs)
    cut.set()
    check(futures, jobs, encoder)
    stage.close()
    assert [device.batches for device in devices] == [ROUNDS] * DEVICES


def test_a_slow_device_gets_less(encoder, pictures):
    cut, others_are_done = threading.Event(), threading.Event()
    slow = Device(lambda: cut.wait(HANG), lambda: others_are_done.wait(HANG))
    devices = [slow, *(Device(lambda: cut.wait(HANG)) for _ in range(DEVICES - 1))]
    stage = VisionStage(devices, torch.bfloat16, threads=2)
    jobs = prompts_of(pictures, DEVICES * ROUNDS)
    futures = submit_all(stage, jobs)
    done = threading.Semaphore(0)
    for future in futures:
        future.add_done_callback(lambda _: done.release())
    cut.set()
    for _ in range(len(jobs) - 2):  # the slow one has a batch running and at most another
        assert done.acquire(timeout=HANG)
    others_are_done.set()
    check(futures, jobs, encoder)
    stage.close()
    assert slow.batches <= 2 and sum(device.batches for device in devices) == len(jobs)


@pytest.mark.parametrize('when', ['start', 'wait'])
def test_no_tile_is_lost_with_a_device(encoder, pictures, caplog, when):
    cut, retired = threading.Event(), threading.Event()

    def die():
        cut.wait(HANG)
        raise RuntimeError('an illegal memory access')

    def others():
        retired.wait(HANG)  # so that the one that dies has taken a tile

    dead = Device(die) if when == 'start' else Device(lambda: cut.wait(HANG), die)
    dead.usable = lambda: False
    devices = [dead, *(Device(others) for _ in range(DEVICES - 1))]
    stage = VisionStage(devices, torch.bfloat16, threads=2)
    retire = stage._queue.retire
    stage._queue.retire = lambda device: retire(device) and not retired.set()
    jobs = prompts_of(pictures, DEVICES * ROUNDS)
    futures = submit_all(stage, jobs)
    cut.set()
    check(futures, jobs, encoder)
    stage.close()
    assert retired.is_set() and 'is not used any more' in caplog.text
    assert sum(device.batches for device in devices[1:]) == len(jobs)


def test_a_busy_device_takes_no_second_batch_while_another_has_none(rng):
    queue, waiting, taken = TileQueue(None, devices=2), threading.Event(), []
    wait = queue._changed.wait

    def wait_for_tiles(timeout=None):
        waiting.set()
        return wait(timeout)

    queue._changed.wait = wait_for_tiles
    idle = threading.Thread(target=lambda: taken.append(queue.take(1, wait=True, device=1)), daemon=True)
    idle.start()
    assert waiting.wait(HANG)
    tile = Tile(b'digest', rng.integers(0, 256, (448, 448, 3), 'uint8'))
    prompt = PendingPrompt(images=[None], groups=[], size=1)
    queue.put(prompt)
    with queue._changed:  # the idle one cannot wake up before the busy one has asked
        queue.cut(prompt, 0, [tile])
        assert queue.take(1, wait=False, device=0) == []
    idle.join(HANG)
    assert taken == [[tile]] and queue.take(1, wait=False, device=0) == []


def test_a_device_that_cannot_start_is_named_and_the_others_end():
    class Broken(Device):
        device = torch.device('cuda', 3)

        def enter_thread(self):
            raise torch.OutOfMemoryError('CUDA out of memory.')

    with no_thread_left(), pytest.raises(DeviceStartError, match='cannot start on cuda:3: CUDA out of memory') as error:
        VisionStage([Device(), Broken(), Device()], torch.bfloat16, threads=2)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


@contextmanager
def no_thread_left():
    """The plugin's threads that begin inside end, without being told to outside."""
    before = set(threading.enumerate())
    yield
    begun = [one for one in set(threading.enumerate()) - before if one.name.startswith('vico-')]
    for thread in begun:
        thread.join(HANG)
    assert [thread.name for thread in begun if thread.is_alive()] == []


class Copying(Device):
    """A stand-in for a device of which results are copied."""

    copies_results = True

    def use_memory(self, memory):
        if memory is not None:
            raise MemoryError('no memory to use')


def fail(*arguments, **options):
    raise MemoryError('no memory to lend')


@pytest.mark.parametrize('late', ['a thread', 'the second arena', 'the memory', 'its use'])
def test_what_fails_late_in_the_start_leaves_no_thread(cuda, monkeypatch, late):
    if late == 'a thread':
        start, begun = DeviceThread.start, []

        def start_one(thread):
            if begun:
                fail()
            begun.append(thread)
            start(thread)

        monkeypatch.setattr(DeviceThread, 'start', start_one)
    elif late == 'the second arena':
        arena = memory.PinnedArena
        monkeypatch.setattr(memory, 'PinnedArena', lambda *about: arena(*about) if about[-1] == 'tiles' else fail())
    elif late == 'the memory':
        monkeypatch.setattr('lmdeploy_vico.stage.stage.StageMemory', fail)
    with no_thread_left(), pytest.raises(MemoryError, match='no memory'):
        VisionStage([Copying(), Copying()], torch.bfloat16, threads=2)
