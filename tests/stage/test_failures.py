"""What fails harms its own prompts at most, and no prompt waits for ever."""

import sys
import threading

import pytest
import torch
from stage.stand_in import StandInEncoder, job
from waiting import HANG

from lmdeploy_vico.stage.errors import EncodingError
from lmdeploy_vico.stage.queue import StageBusyError
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.stage.work import FAILURES, Work

pytestmark = pytest.mark.busy


def trouble(tiles):
    raise RuntimeError('device trouble')


@pytest.fixture
def good_and_broken(monkeypatch):
    """A stage with a device that works once the other one is retired, and that other one, which fails on all tiles."""
    good, broken, retired = StandInEncoder(), StandInEncoder(), threading.Event()

    def start(tiles):
        assert retired.wait(HANG)  # so that the broken one takes tiles
        return encode(tiles)

    def retire(device):
        was_retired = retire_device(device)
        retired.set()
        return was_retired

    encode = good.start
    monkeypatch.setattr(good, 'start', start)
    monkeypatch.setattr(broken, 'start', trouble)
    stage = VisionStage([good, broken], torch.float32, threads=2)
    retire_device = stage._queue.retire
    monkeypatch.setattr(stage._queue, 'retire', retire)
    yield stage, broken
    retired.set()
    stage.close()


def test_a_broken_device_is_given_up_and_harms_nobody(good_and_broken, pictures, caplog):
    stage, _ = good_and_broken
    names = ('coffee', 'page', 'rocket', 'chelsea', 'text')
    for future in [stage.submit([job(pictures[name])], 'auto') for name in names]:
        assert len(future.result(HANG)) == 1
    stage.close()  # with it the broken one's thread has ended, and has logged what it had to
    assert 'has failed on 3 batches in a row and is not used any more' in caplog.text


def test_a_device_that_does_not_answer_is_given_up_at_once(good_and_broken, pictures, caplog):
    stage, broken = good_and_broken
    broken.usable = lambda: False
    assert len(stage.submit([job(pictures['coffee'])], 'auto').result(HANG)) == 1
    stage.close()
    assert 'has failed on 1 batches in a row and is not used any more' in caplog.text


def failing(encoder, monkeypatch, error, times):
    start, left = encoder.start, [times]

    def fail(tiles):
        if left[0]:
            left[0] -= 1
            raise error
        return start(tiles)

    monkeypatch.setattr(encoder, 'start', fail)


def test_a_batch_that_fails_is_tried_again(stage, encoder, pictures, monkeypatch):
    [expected] = encoder.encode([pictures['coffee']])
    failing(encoder, monkeypatch, RuntimeError('device trouble'), times=1)
    [image] = stage.submit([job(pictures['coffee'])], 'auto').result()
    assert torch.equal(image.tokens.embeddings, expected.embeddings.to(torch.bfloat16))


@pytest.mark.parametrize(
    'error, raised', [(RuntimeError('device trouble'), EncodingError), (torch.OutOfMemoryError('full'),) * 2]
)
def test_what_fails_twice_fails_its_prompts_and_no_others(stage, encoder, pictures, monkeypatch, error, raised):
    failing(encoder, monkeypatch, error, times=2)
    kind = raised if isinstance(raised, type) else type(raised)
    with pytest.raises(kind, match=str(error)):
        stage.submit([job(pictures['coffee'], 1)], 'auto').result()
    for name in ('coffee', 'chelsea'):  # the same tile as well: it may have been the device
        assert len(stage.submit([job(pictures[name], 1)], 'auto').result()) == 1


def test_a_failure_to_project_belongs_to_its_prompt(stage, encoder, pictures, monkeypatch):
    project = encoder.project

    def fail(patches, compressed):
        if compressed:
            raise RuntimeError('device trouble')
        return project(patches, compressed)

    monkeypatch.setattr(encoder, 'project', fail)
    with pytest.raises(EncodingError, match='could not be encoded: device trouble'):
        stage.submit([job(pictures['coffee'])], 'all').result()
    assert len(stage.submit([job(pictures['coffee'])], 'none').result()) == 1


def fails(monkeypatch, target, name, times=1):
    """Have a function fail so many times, unlike anything that is expected of it."""
    function, left = getattr(target, name), [times]

    def fail(*arguments):
        if left[0]:
            left[0] -= 1
            raise MemoryError('unexpected')
        return function(*arguments)

    monkeypatch.setattr(target, name, fail)


@pytest.mark.parametrize(
    'place',
    [
        *('_metrics.tiles_per_batch.observe', '_metrics.model_forward.observe', '_metrics.queue_wait.observe'),
        *(
            '_queue._take',
            '_queue.pop_encoded',
            '_queue.give_back',
            '_cache.keep',
            '_workers.0._start',
            '_workers.0._end',
        ),
    ],
)
def test_a_device_thread_outlives_what_nobody_expects(stage, encoder, pictures, monkeypatch, place):
    [expected] = encoder.encode([pictures['coffee']])
    *path, name = place.split('.')
    target = stage
    for attribute in path:
        target = target[int(attribute)] if attribute.isdigit() else getattr(target, attribute)
    if name == 'give_back':
        failing(encoder, monkeypatch, RuntimeError('device trouble'), times=1)
    fails(monkeypatch, target, name)
    [image] = stage.submit([job(pictures['coffee'])], 'auto').result(60)
    assert torch.equal(image.tokens.embeddings, expected.embeddings.to(torch.bfloat16))
    assert stage._workers[0]._thread.is_alive()


@pytest.mark.parametrize('name', ['TileFeatures', 'EncodedImage'])
def test_what_fails_when_a_prompt_is_finished_fails_that_prompt(stage, pictures, monkeypatch, name):
    fails(monkeypatch, sys.modules[Work.__module__], name)
    with pytest.raises(EncodingError, match='unexpected'):
        stage.submit([job(pictures['coffee'])], 'auto').result(60)
    assert len(stage.submit([job(pictures['coffee'])], 'auto').result(60)) == 1


def test_prompts_that_are_ready_together_do_not_share_a_failure(stage, held, pictures, monkeypatch):
    entered, release = held
    futures = [stage.submit([job(pictures['coffee'], 1)], 'auto')]
    entered.wait()
    futures += [stage.submit([job(pictures['coffee'], 1)], 'auto') for _ in range(2)]
    barrier = threading.Barrier(2, timeout=HANG)
    for reached in [stage._prepare.submit(barrier.wait) for _ in range(2)]:
        reached.result()  # both threads have cut everything by now
    fails(monkeypatch, stage._work, '_finish')
    release.set()
    with pytest.raises(EncodingError, match='unexpected'):
        futures[0].result(60)
    assert [len(future.result(60)) for future in futures[1:]] == [1, 1]


def test_what_fails_again_and_again_fails_what_waits(stage, pictures, monkeypatch):
    fails(monkeypatch, stage._queue, '_take', times=FAILURES)
    with pytest.raises(EncodingError, match='unexpected'):
        stage.submit([job(pictures['coffee'], 1)], 'auto').result(60)
    assert len(stage.submit([job(pictures['coffee'], 1)], 'auto').result(60)) == 1


def test_a_device_that_keeps_failing_is_reported_once_and_goes_on(stage, encoder, pictures, monkeypatch, caplog):
    failing(encoder, monkeypatch, RuntimeError('device trouble'), times=6)
    for _ in range(3):
        with pytest.raises(EncodingError, match='device trouble'):
            stage.submit([job(pictures['coffee'], 1)], 'auto').result(60)
    assert len(stage.submit([job(pictures['coffee'], 1)], 'auto').result(60)) == 1
    assert caplog.text.count('has failed on 3 batches in a row, and there is no other device') == 1


@pytest.mark.parametrize('broken', ['start', 'visual_tokens'])
def test_when_the_last_device_is_broken_images_are_refused(stage, encoder, pictures, monkeypatch, caplog, broken):
    def fail(*arguments):
        raise RuntimeError('an illegal memory access')

    monkeypatch.setattr(encoder, broken, fail)
    monkeypatch.setattr(encoder, 'usable', lambda: False)
    prompts = [stage.submit([job(pictures[name])], 'auto') for name in ('coffee', 'page')]
    for future in prompts:
        with pytest.raises(EncodingError, match='an illegal memory access|has to be restarted'):
            future.result(60)
    stage._workers[0]._thread.join(HANG)
    refusals = [lambda: stage.submit([job(pictures['page'])], 'auto'), lambda: stage.admit(1)]
    for refused in refusals:
        with pytest.raises(StageBusyError, match='has failed; the server has to be restarted'):
            refused()
    assert caplog.text.count('restart the server') == 1
