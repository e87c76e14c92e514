"""A worker, whatever its process does: what is answered, what is counted, and what is started again."""

import contextlib
import errno
import logging
import os
import resource
import signal
import subprocess

import pytest
from media.files import encoded, noise
from media.workers import taken_over

from lmdeploy_vico.media.errors import MediaBusyError, MediaError
from lmdeploy_vico.media.memory import MemoryBudget, MemoryShare
from lmdeploy_vico.media.options import PictureOptions, VideoOptions
from lmdeploy_vico.media.workers import worker as module
from lmdeploy_vico.media.workers.channel import ChannelClosedError
from lmdeploy_vico.media.workers.worker import KEPT, Job, Worker

PICTURE = encoded(noise(), 'PNG')
PIXELS = 56 * 40
TAKEN = 11 * PIXELS
BUSY = 'cannot be decoded now. Try again later'


@pytest.fixture
def worker():
    one = Worker(None)
    yield one
    one.stop()


@pytest.fixture
def stand_in(monkeypatch):
    """Start another program in the place of the one that decodes."""
    monkeypatch.setattr(module, 'MODULE', 'media.workers.taken_over')


@pytest.fixture
def share():
    """Of a budget that has room for one picture, and not for two."""
    one = MemoryShare(MemoryBudget(TAKEN + PIXELS))
    with one.in_use():
        yield one


def job(data=PICTURE, share=None, options=None, seconds=10):
    return Job(data, options or PictureOptions(), share, lambda width, height: 0, seconds)


def descriptors():
    return len(os.listdir('/proc/self/fd'))


def end_before(worker, monkeypatch, name, end):
    """Call ``end``, which ends the process, before a method is called first; returns a list of its calls."""
    calls, method = [], getattr(worker, name)

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            process = worker._process
            end()
            process.wait()
        return method(*arguments)

    monkeypatch.setattr(worker, name, call)
    return calls


# --- what a process says ---------------------------------------------------------------------------------------------


def test_the_stand_in_is_understood(worker, stand_in, share):
    [image] = worker.decode(job(b'good', share))
    assert image.size == (taken_over.WIDTH, taken_over.HEIGHT)


@pytest.mark.parametrize('what', taken_over.WRONG)
def test_a_wrong_answer_ends_the_process_and_harms_nothing(worker, stand_in, share, caplog, what):
    before = descriptors()
    with pytest.raises(MediaError, match='it ends what decodes it'):
        worker.decode(job(what.encode(), share))
    assert share._budget.taken == 0 and worker._process is None and descriptors() == before
    assert 'something it said is wrong' in caplog.text
    worker.decode(job(b'good'))


def test_a_video_has_no_more_frames_than_were_asked_for(worker, stand_in):
    with pytest.raises(MediaError, match='it ends what decodes it'):
        worker.decode(job(b'two pictures', options=VideoOptions(num_frames=1)))


# --- a process that ends ---------------------------------------------------------------------------------------------


def test_a_file_at_which_processes_end_is_refused(worker, stand_in, share, caplog):
    with pytest.raises(MediaError, match='it ends what decodes it'):
        worker.decode(job(b'end', share))
    assert caplog.text.count('ended with status 3') == 2 and share._budget.taken == 0


def test_the_second_try_takes_its_memory_once(worker, share, monkeypatch):
    worker.start()
    calls = end_before(worker, monkeypatch, '_pixels', worker._process.kill)
    worker.decode(job(share=share))
    assert len(calls) == 2 and share._budget.taken == PIXELS * KEPT


def test_what_fails_after_memory_was_taken_gives_it_back(worker, share):
    damaged = PICTURE[: len(PICTURE) // 2]
    with pytest.raises(MediaError, match='damaged or truncated'):
        worker.decode(job(damaged, share))
    assert share._budget.taken == 0


@pytest.mark.parametrize('name', ['_decode', '_answer', '_pixels'])
def test_a_closed_worker_starts_nothing(worker, monkeypatch, caplog, name):
    worker.start()
    started = []
    monkeypatch.setattr(module.subprocess, 'Popen', lambda *args, **options: started.append(args))
    end_before(worker, monkeypatch, name, worker.close)
    with pytest.raises(MediaBusyError, match='shutting down. Try again later'):
        worker.decode(job())
    with pytest.raises(MediaBusyError, match='shutting down. Try again later'):
        worker.start()
    assert started == [] and worker._process is None and not caplog.records


def test_a_worker_that_is_closed_while_it_starts(worker, monkeypatch, caplog):
    def receive(channel):
        worker.close()
        raise ChannelClosedError

    monkeypatch.setattr(module, 'receive', receive)
    with pytest.raises(MediaBusyError, match='shutting down'):
        worker.decode(job())
    assert worker._process is None and not caplog.records


def test_no_warning_of_a_process_that_was_ended_for_a_client_that_left(worker, caplog):
    """Also if the file was done when it was ended: the next one is decoded by another process."""
    worker.decode(job())
    worker.kill()
    worker.decode(job())
    assert not caplog.records


# --- faults of the server --------------------------------------------------------------------------------------------


def test_a_process_that_does_not_start(worker, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(module, 'MODULE', 'media.workers.no_such_program')
        with pytest.raises(MediaBusyError, match=BUSY):
            worker.decode(job())
    assert 'a process that decodes does not start' in caplog.text and 'status 1' in caplog.text
    worker.decode(job())


@pytest.mark.parametrize('number', [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE])
def test_a_process_that_cannot_be_made(worker, monkeypatch, caplog, number):
    before = descriptors()

    def fails(*arguments, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, 'Popen', fails)
        with pytest.raises(MediaBusyError, match=BUSY):
            worker.decode(job())
    assert os.strerror(number) in caplog.text and descriptors() == before
    worker.decode(job())


@contextlib.contextmanager
def few_descriptors(spare):
    """Leave only so many in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir('/proc/self/fd'))) + 20, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open('/dev/null', os.O_RDONLY))
        for _ in range(spare):
            os.close(held.pop())
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize('started', [True, False])
@pytest.mark.parametrize('spare', range(4))
def test_a_server_without_descriptors_is_busy(worker, share, started, spare):
    if started:
        worker.start()
    before = descriptors()
    with few_descriptors(spare):
        try:
            worker.decode(job(share=share))
        except MediaBusyError as error:
            assert BUSY in str(error) and share._budget.taken == 0
        else:
            assert started and spare > 1
    worker.decode(job())
    worker.stop()
    assert descriptors() == before - started


@pytest.mark.parametrize(
    'patience, options', [('PATIENCE', PictureOptions()), ('VIDEO_PATIENCE', VideoOptions())], ids=['picture', 'video']
)
def test_a_process_that_got_no_processor_is_no_fault_of_the_file(worker, share, monkeypatch, caplog, patience, options):
    worker.start()
    os.kill(worker._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(module, patience, 0.01)
    with pytest.raises(MediaBusyError, match=BUSY):
        worker.decode(job(share=share, options=options))
    assert 'seconds only' in caplog.text and share._budget.taken == 0
    monkeypatch.undo()
    worker.decode(job())


def test_a_process_that_has_computed_for_long_enough_is_the_files_fault(worker, stand_in, monkeypatch):
    monkeypatch.setattr(module, 'PATIENCE', 0.01)
    times = iter([3.0, 13.0])
    monkeypatch.setattr(worker, '_processor_time', lambda: next(times))
    with pytest.raises(MediaError, match='takes longer to decode than 10 seconds of a processor'):
        worker.decode(job(b'wait'))


def test_processor_time_of_a_process(worker):
    worker.start()
    assert worker._processor_time() > 0
    worker._process.kill()
    worker._process.wait()
    assert worker._processor_time() == 0


@pytest.fixture(autouse=True)
def warnings_only(caplog):
    caplog.set_level(logging.WARNING)
