"""Encoders that come, go and differ, on a cluster that does what a test says. (With Ray: test_ray.py.)"""

import threading

import pytest
import torch
from stage.remote.fake_cluster import FakeCluster, FakeEncoder, wait_until
from stage.stand_in import StandInEncoder, job
from waiting import HANG

from lmdeploy_vico.stage.errors import DeviceStartError, EncodingError
from lmdeploy_vico.stage.metrics import stage_metrics
from lmdeploy_vico.stage.queue import StageBusyError
from lmdeploy_vico.stage.remote import fleet

pytestmark = pytest.mark.busy

NAMES = ('coffee', 'rocket', 'chelsea', 'astronaut', 'text', 'page')
CACHE = 2**24


def check(future, picture, compression='auto'):
    [image] = future.result(HANG)
    [expected] = StandInEncoder().encode([picture], compression)
    assert image.tokens.tile_tokens == expected.tile_tokens and image.tokens.scores == expected.scores
    assert torch.equal(image.tokens.embeddings, expected.embeddings.to(torch.bfloat16))


def submit_all(stage, pictures):
    return [(stage.submit([job(pictures[name])], 'auto'), pictures[name]) for name in NAMES]


def lanes(stage):
    return stage._workers[0]._lanes


def test_tokens_are_those_of_an_encoder_here(stage_on, pictures):
    first, second = FakeEncoder('first'), FakeEncoder('second')
    stage = stage_on(FakeCluster(first, second), cache_bytes=CACHE)
    wait_until(lambda: len(lanes(stage)) == 2)
    for compression in ('auto', 'none', 'all', 0.5):
        futures = [(stage.submit([job(pictures[name])], compression), pictures[name]) for name in NAMES]
        for future, picture in futures:
            check(future, picture, compression)
    together = stage.submit([job(pictures['coffee']), job(pictures['page'])], 'auto').result(HANG)
    expected = StandInEncoder().encode([pictures['coffee'], pictures['page']])
    for image, tokens in zip(together, expected, strict=True):
        assert torch.equal(image.tokens.embeddings, tokens.embeddings.to(torch.bfloat16))


def test_a_tile_crosses_the_wire_once_and_its_tokens_once(stage_on, pictures):
    encoder, moved = FakeEncoder('one'), stage_metrics().remote_bytes
    stage = stage_on(FakeCluster(encoder), cache_bytes=CACHE)
    sent, received = moved.labels('sent')._value.get(), moved.labels('received')._value.get()
    tokens = 0
    for compression in ('none', 'all', 0.5):
        [image] = stage.submit([job(pictures['coffee'])], compression).result(HANG)
        tokens += sum(image.tokens.tile_tokens)
    tiles = len(image.tokens.tile_tokens)
    assert encoder.received == tiles and encoder.calls['encode'] == -(-tiles // 2) and encoder.calls['project'] == 3
    assert moved.labels('sent')._value.get() - sent == tiles * 448 * 448 * 3
    assert moved.labels('received')._value.get() - received == tokens * 8 * 2  # H = 8, bfloat16


@pytest.mark.parametrize('restart', [False, True], ids=['for good', 'and restarted'])
def test_no_request_is_lost_with_an_encoder(stage_on, pictures, restart):
    first, second = FakeEncoder('first'), FakeEncoder('second')
    cluster = FakeCluster(first, second)
    first.open.clear()
    stage = stage_on(cluster)
    wait_until(lambda: len(lanes(stage)) == 2)
    futures = submit_all(stage, pictures)
    assert first.entered.wait(HANG)
    first.kill()
    if restart:
        first.start()
    else:
        del cluster.encoders['first']
    for future, picture in futures:
        check(future, picture)
    wait_until(lambda: len(lanes(stage)) == 1 + restart)
    if restart:
        assert lanes(stage)['first'].encoder.incarnation == 'first-2'


def test_an_encoder_that_dies_between_encoding_and_projecting_costs_its_tiles_once_more(stage_on, pictures):
    first, cluster = FakeEncoder('first'), FakeCluster()
    cluster.encoders['first'] = first
    stage = stage_on(cluster)
    project, asked = first.service.project, threading.Event()

    def die(*arguments):
        asked.set()
        first.kill()
        cluster.encoders = {'second': FakeEncoder('second')}
        return project(*arguments)

    first.service.project = die
    check(stage.submit([job(pictures['coffee'])], 'auto'), pictures['coffee'])
    second = cluster.encoders['second']
    assert asked.is_set() and second.calls['encode'] == 0 and second.calls['encode_and_project'] == 2


def test_features_that_an_encoder_has_dropped_are_made_again(stage_on, pictures):
    encoder = FakeEncoder('one', cache_bytes=0)  # so small that nothing is kept until it is asked for
    stage = stage_on(FakeCluster(encoder), cache_bytes=CACHE)
    for _ in range(2):
        check(stage.submit([job(pictures['coffee'])], 'auto'), pictures['coffee'])
    assert encoder.calls['encode'] == 2 and encoder.calls['encode_and_project'] == 4


def test_prompts_wait_for_an_encoder_and_are_refused_when_none_comes(stage_on, pictures, monkeypatch):
    encoder = FakeEncoder('one')
    cluster = FakeCluster(encoder)
    stage = stage_on(cluster)
    worker, now = stage._workers[0], [0.0]
    monkeypatch.setattr(worker, '_clock', lambda: now[0])
    worker._alone_since = 0.0
    encoder.open.clear()
    first = stage.submit([job(pictures['coffee'])], 'auto')
    assert encoder.entered.wait(HANG)
    encoder.kill()
    cluster.encoders.clear()
    wait_until(lambda: not lanes(stage))
    assert not first.done()
    encoder.start()
    cluster.encoders['one'] = encoder
    check(first, pictures['coffee'])  # within the bound: it waited

    encoder.open.clear()
    encoder.entered.clear()
    second = stage.submit([job(pictures['rocket'])], 'auto')
    assert encoder.entered.wait(HANG)
    encoder.kill()
    cluster.encoders.clear()
    wait_until(lambda: not lanes(stage))
    now[0] = 601.0
    with pytest.raises(StageBusyError, match=r'No encoder of ray:here has been there for 600 s. Try again later'):
        second.result(HANG)
    with pytest.raises(StageBusyError, match='No encoder of ray:here'):
        stage.admit(1)
    with pytest.raises(StageBusyError, match='No encoder of ray:here'):
        stage.submit([job(pictures['rocket'])], 'auto')
    cluster.encoders['two'] = FakeEncoder('two')
    wait_until(lambda: lanes(stage))
    check(stage.submit([job(pictures['rocket'])], 'auto'), pictures['rocket'])


def test_an_encoder_that_falls_silent_is_given_up(stage_on, pictures, monkeypatch):
    silent, other = FakeEncoder('silent'), FakeEncoder('other')
    cluster = FakeCluster(silent)
    stage = stage_on(cluster)
    silent.open.clear()
    future = stage.submit([job(pictures['coffee'])], 'auto')
    assert silent.entered.wait(HANG)
    silent.silent = True
    worker = stage._workers[0]
    now = [worker._clock()]
    monkeypatch.setattr(worker, '_clock', lambda: now[0])
    wait_until(lambda: silent.unanswered)
    cluster.encoders['other'] = other
    now[0] += fleet.SILENCE + 1
    check(future, pictures['coffee'])
    assert 'silent' not in lanes(stage)
    silent.open.set()


def test_an_encoder_that_fails_without_dying_counts_as_a_device(stage_on, pictures, monkeypatch):
    encoder = FakeEncoder('one')
    stage = stage_on(FakeCluster(encoder))

    def fail(tiles):
        raise RuntimeError('an illegal memory access')

    monkeypatch.setattr(encoder.encoder, 'start', fail)
    with pytest.raises(EncodingError, match='could not be encoded: an illegal memory access'):
        stage.submit([job(pictures['coffee'], 1)], 'auto').result(HANG)
    assert encoder.calls['encode'] == 2


def test_a_cancelled_prompt_is_not_sent(stage_on, pictures):
    encoder = FakeEncoder('one')
    encoder.open.clear()
    stage = stage_on(FakeCluster(encoder))
    first = stage.submit([job(pictures['coffee'])], 'auto')
    assert encoder.entered.wait(HANG)
    others = [stage.submit([job(pictures[name])], 'auto') for name in NAMES[1:]]
    assert all(other.cancel() for other in others)
    encoder.open.set()
    check(first, pictures['coffee'])
    tiles = job(pictures['coffee']).tiles
    assert encoder.received <= tiles + 2  # the second batch on the way may have begun with tiles of another


def test_the_queues_limit_holds(stage_on, pictures):
    encoder = FakeEncoder('one')
    encoder.open.clear()
    stage = stage_on(FakeCluster(encoder), capacity=3)
    first = stage.submit([job(pictures['coffee'])], 'auto')
    with pytest.raises(StageBusyError, match='exceed the limit of 3'):
        stage.submit([job(pictures['rocket'])], 'auto')
    encoder.open.set()
    check(first, pictures['coffee'])


def test_two_stages_share_two_encoders(stage_on, pictures):
    first, second = FakeEncoder('first'), FakeEncoder('second')
    cluster = FakeCluster(first, second)
    stages = [stage_on(cluster), stage_on(cluster)]
    for stage in stages:
        wait_until(lambda stage=stage: len(lanes(stage)) == 2)
    for future, picture in [pair for stage in stages for pair in submit_all(stage, pictures)]:
        check(future, picture)
    assert first.calls['encode'] and second.calls['encode']


@pytest.mark.parametrize(
    ('hello', 'sentence'),
    [
        ({'version': '0.0.1'}, 'The encoder odd on here runs lmdeploy-vico 0.0.1, this server .*: install one version'),
        ({'checkpoint': '0123'}, r'serves another checkpoint, /checkpoint \(fingerprint 0123, this server'),
    ],
)
def test_a_server_refuses_to_start_with_a_stranger_and_names_it(stage_on, hello, sentence):
    cluster = FakeCluster(FakeEncoder('odd', **hello))
    with pytest.raises(DeviceStartError, match=f'The vision side cannot start on ray:here: .*{sentence}'):
        stage_on(cluster)
    assert cluster.closed


def test_an_encoder_of_another_data_type_is_left_out_by_name(stage_on, pictures, caplog):
    cluster = FakeCluster(FakeEncoder('one'))
    stage = stage_on(cluster)
    cluster.encoders['odd'] = odd = FakeEncoder('odd', dtype='bfloat16')
    wait_until(lambda: 'The encoder odd on here differs in its data type, bfloat16, from the others' in caplog.text)
    for future, picture in submit_all(stage, pictures):
        check(future, picture)
    assert odd.received == 0


def test_without_an_encoder_a_server_says_what_to_start(stage_on):
    cluster = FakeCluster(others=['cousin'])
    with pytest.raises(DeviceStartError, match=r'after 0 s. Start some with `lmdeploy-vico encoder .*there: cousin\.'):
        stage_on(cluster, seconds=0.0)
    assert cluster.closed
