"""A stage takes, shares, finishes and cancels prompts; its device is a stand-in."""

import threading

import pytest
import torch
from PIL import Image
from stage.sharing import require_shared_batches
from stage.stand_in import StandInEncoder, cut, job
from waiting import HANG

from lmdeploy_vico.stage.queue import StageBusyError
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.vision.tiling import tile_digests

pytestmark = pytest.mark.busy


def test_hands_on_the_encoders_tokens_in_the_language_models_dtype(stage, encoder, pictures):
    [image] = stage.submit([job(pictures['coffee'])], 'auto').result()
    [expected] = encoder.encode([pictures['coffee']])
    assert torch.equal(image.tokens.embeddings, expected.embeddings.to(torch.bfloat16))
    assert image.tokens.tile_tokens == expected.tile_tokens
    assert image.digests == tile_digests(cut(pictures['coffee']))


def test_prompts_do_not_influence_each_other(stage, encoder, pictures):
    prompts = [['coffee'], ['page', 'astronaut'], ['chelsea'], ['coffee', 'chelsea']]
    futures = [stage.submit([job(pictures[name]) for name in names], 'auto') for names in prompts]
    for names, future in zip(prompts, futures, strict=True):
        expected = encoder.encode([pictures[name] for name in names])
        for image, tokens in zip(future.result(), expected, strict=True):
            assert image.tokens.tile_tokens == tokens.tile_tokens
            assert torch.equal(image.tokens.embeddings, tokens.embeddings.to(torch.bfloat16))


def test_limits_and_compression_of_a_single_image(stage, pictures):
    jobs = [job(pictures['coffee'], 1, compression='all'), job(pictures['coffee'], 2)]
    first, second = stage.submit(jobs, 'none').result()
    assert first.tokens.tile_tokens == [64]
    assert set(second.tokens.tile_tokens) == {256} and 1 < len(second.tokens.tile_tokens) <= 3


def test_a_failure_belongs_to_its_prompt(stage, pictures):
    class Broken:
        size, mode = (10, 10), 'L'

        def load(self):
            pass

        def resize(self, size):
            raise OSError('damaged')

    bad = stage.submit([job(pictures['page']), job(Broken())], 'auto')
    good = stage.submit([job(pictures['page'])], 'auto')
    with pytest.raises(OSError, match='damaged'):
        bad.result()
    assert len(good.result()) == 1


@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_one_picture_that_is_not_read_yet_in_many_prompts(encoder, pictures, tmp_path, kind):
    pictures['coffee'].save(tmp_path / 'picture', kind)
    picture = Image.open(tmp_path / 'picture')
    [expected], digests = encoder.encode([picture]), tile_digests(cut(picture))
    stage = VisionStage([encoder], torch.float32, threads=8, capacity=200)
    lazy = Image.open(tmp_path / 'picture')
    for future in [stage.submit([job(lazy)] * 4, 'auto') for _ in range(4)]:
        for image in future.result():
            assert torch.equal(image.tokens.embeddings[:1], expected.embeddings[:1])
            assert image.digests == digests
    stage.close()


def test_close_finishes_what_is_on_the_device_and_cancels_what_waits(stage, held, pictures, monkeypatch):
    entered, release = held
    running = stage.submit([job(pictures['astronaut'], 1)], 'auto')
    entered.wait()
    waiting = stage.submit([job(pictures['astronaut'])], 'auto')

    def close():
        prompts = close_queue()
        release.set()  # not before: the device would take the waiting prompt
        return prompts

    close_queue = stage._queue.close
    monkeypatch.setattr(stage._queue, 'close', close)
    stage.close()
    assert len(running.result()) == 1 and waiting.cancelled()


def test_a_cancelled_prompt_leaves_the_queue(encoder, held, pictures):
    entered, release = held
    stage = VisionStage([encoder], torch.bfloat16, threads=2, capacity=1)
    jobs = [job(pictures['astronaut'], 1)]
    running = stage.submit(jobs, 'auto')
    entered.wait()
    with pytest.raises(StageBusyError, match='1 tiles are waiting .* limit of 1 .* Try again later'):
        stage.submit(jobs, 'auto')
    running.cancel()
    waiting = stage.submit(jobs, 'auto')
    release.set()
    assert len(waiting.result()) == 1
    stage.close()


def test_a_prompt_larger_than_the_queue_is_accepted_when_nothing_waits(encoder, pictures):
    stage = VisionStage([encoder], torch.bfloat16, threads=2, capacity=1)
    assert len(stage.submit([job(pictures['coffee'])], 'auto').result()[0].digests) > 1
    stage.close()


def test_batches_hold_tiles_of_several_prompts(pictures, monkeypatch):
    encoder = StandInEncoder(tile_batch=4)
    require_shared_batches(encoder, encoder.encode, job, pictures, monkeypatch)


def test_metrics(stage, pictures):
    from prometheus_client import REGISTRY

    names = {
        'vico:tiles_total': {'resolution': 'compressed'},
        'vico:visual_tokens_total': {},
        'vico:visual_tokens_saved_total': {},
        'vico:encoder_preprocess_seconds_count': {},
        'vico:encoder_queue_wait_seconds_count': {},
        'vico:encoder_tiles_per_batch_sum': {},
        'vico:encoder_model_forward_seconds_count': {},
        'vico:embedding_cache_misses_total': {},
    }

    def read():
        return [REGISTRY.get_sample_value(name, labels) or 0 for name, labels in names.items()]

    before = read()
    [first, second] = stage.submit([job(pictures['coffee']), job(pictures['page'], 1)], 0.5).result()
    tile_tokens = [*first.tokens.tile_tokens, *second.tokens.tile_tokens]
    low = tile_tokens.count(64)
    assert 0 < low < len(tile_tokens)
    gained = [after - then for after, then in zip(read(), before, strict=True)]
    tiles = len(tile_tokens)
    assert gained == [low, sum(tile_tokens), 192 * low, 2, 1, tiles, tiles, tiles]


def count_batches(encoder, monkeypatch):
    sizes, start = [], encoder.start

    def counted(tiles):
        sizes.append(len(tiles))
        return start(tiles)

    monkeypatch.setattr(encoder, 'start', counted)
    return sizes


def test_a_repeated_image_is_not_encoded_again_whatever_its_compression(encoder, pictures, monkeypatch):
    sizes = count_batches(encoder, monkeypatch)
    stage = VisionStage([encoder], torch.float32, threads=2, cache_bytes=2**30)
    jobs = [job(pictures['coffee'])]
    first = {value: stage.submit(jobs, value).result()[0].tokens for value in ('auto', 'none', 'all', 0.5)}
    assert sum(sizes) == len(first['none'].tile_tokens)
    for value, tokens in first.items():
        [expected] = encoder.encode([pictures['coffee']], value)
        assert tokens.tile_tokens == expected.tile_tokens and tokens.scores == expected.scores
        assert torch.equal(tokens.embeddings, expected.embeddings)
    stage.close()


def all_are_cut(stage):
    """Wait until both threads of the stage have cut everything that was submitted."""
    barrier = threading.Barrier(2, timeout=HANG)
    for reached in [stage._prepare.submit(barrier.wait) for _ in range(2)]:
        reached.result()


def test_what_is_in_flight_is_encoded_once(encoder, held, pictures):
    entered, release = held
    stage = VisionStage([encoder], torch.float32, threads=2)
    first = stage.submit([job(pictures['coffee'])], 'none')
    entered.wait()
    others = [stage.submit([job(pictures['coffee'])] * 2, value) for value in ('all', 'auto')]
    all_are_cut(stage)
    first.cancel()  # the others need its tiles all the same
    release.set()
    [expected] = encoder.encode([pictures['coffee']], 'all')
    for image in others[0].result():
        assert torch.equal(image.tokens.embeddings, expected.embeddings)
    assert len(others[1].result()) == 2
    stage.close()


def test_images_of_another_salt_share_nothing(encoder, pictures, monkeypatch):
    """Neither kept tiles nor their digests, of which the prefix cache's keys are made; the tokens are the same."""
    sizes = count_batches(encoder, monkeypatch)
    stage = VisionStage([encoder], torch.float32, threads=2, cache_bytes=2**30)
    found = [stage.submit([job(pictures['coffee'], salt=salt)], 'none').result()[0] for salt in ('', 'a', 'b', 'a')]
    tiles = len(found[0].digests)
    assert sum(sizes) == 3 * tiles
    assert len({digest for image in found for digest in image.digests}) == 3 * tiles
    assert found[1].digests == found[3].digests
    assert all(torch.equal(image.tokens.embeddings, found[0].tokens.embeddings) for image in found)
    stage.close()


@pytest.mark.parametrize('salts, encoded', [(('a', 'a'), 1), (('a', 'b'), 2), (('a', ''), 2)])
def test_what_is_in_flight_is_shared_by_images_of_one_salt(encoder, held, pictures, monkeypatch, salts, encoded):
    sizes = count_batches(encoder, monkeypatch)
    entered, release = held
    stage = VisionStage([encoder], torch.float32, threads=2)
    first, second = (stage.submit([job(pictures['coffee'], 1, salt=salt)], 'none') for salt in salts)
    entered.wait()
    all_are_cut(stage)
    release.set()
    assert len(first.result()) == len(second.result()) == 1
    assert sum(sizes) == encoded
    stage.close()


def test_jobs_of_one_video_are_routed_together(stage, encoder, pictures):
    jobs = [job(pictures[name], 1, compression=0.5, routed_with=7) for name in ('page', 'chelsea', 'rocket', 'text')]
    tokens = [image.tokens for image in stage.submit([*jobs, job(pictures['astronaut'], 1)], 'none').result()]
    assert tokens[-1].tile_tokens == [256]
    ranked = sorted(tokens[:-1], key=lambda one: one.scores[0])
    assert [one.tile_tokens for one in ranked] == [[256], [256], [64], [64]]


def test_several_devices_share_the_work(pictures):
    encoders = [StandInEncoder() for _ in range(2)]
    barrier = threading.Barrier(2, timeout=HANG)
    met = []
    for one in encoders:

        def start(tiles, encode=one.start):
            if not met:
                barrier.wait()  # each of them has a batch at the same time
                met.append(True)
            return encode(tiles)

        one.start = start
    stage = VisionStage(encoders, torch.float32, threads=2)
    [image] = stage.submit([job(pictures['coffee'])], 'auto').result()
    [expected] = encoders[0].encode([pictures['coffee']])
    assert met and torch.equal(image.tokens.embeddings, expected.embeddings)
    stage.close()


def test_a_submission_after_close_is_refused(encoder, pictures):
    stage = VisionStage([encoder], torch.float32, threads=1)
    stage.close()
    with pytest.raises(StageBusyError, match='shutting down'):
        stage.submit([job(pictures['page'])], 'auto')


def test_a_prompt_that_is_cancelled_when_it_is_finished_is_not_counted(stage, encoder, held, pictures, monkeypatch):
    entered, release = held
    cancelled = stage.submit([job(pictures['coffee'], 1)], 'none')
    entered.wait()
    visual_tokens, counted = encoder.visual_tokens, []

    def cancel(*arguments):
        cancelled.cancel()
        return visual_tokens(*arguments)

    monkeypatch.setattr(encoder, 'visual_tokens', cancel)
    monkeypatch.setattr(stage._metrics, 'count_tiles', counted.append)
    release.set()
    stage.submit([job(pictures['page'], 1)], 'all').result(60)
    assert cancelled.cancelled() and counted == [[64]]
