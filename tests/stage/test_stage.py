import threading

import pytest
import torch
from PIL import Image

from lmdeploy_vico.stage.queue import StageBusyError
from lmdeploy_vico.stage.stage import ImageJob, VisionStage
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.tiling import tile_digests


@pytest.fixture(scope='module')
def encoder(make_checkpoint):
    return VisionEncoder.from_pretrained(make_checkpoint())


@pytest.fixture
def stage(encoder):
    stage = VisionStage(encoder, torch.bfloat16, threads=2, capacity=200)
    yield stage
    stage.close()


def test_hands_on_the_encoders_tokens_in_the_language_models_dtype(stage, encoder, pictures):
    [image] = stage.submit([ImageJob(pictures['coffee'])], 'auto').result()
    [expected] = encoder.encode([pictures['coffee']])
    assert torch.equal(image.tokens.embeddings, expected.embeddings.to(torch.bfloat16))
    assert image.tokens.tile_tokens == expected.tile_tokens
    assert image.digests == tile_digests(encoder.cut(pictures['coffee']))


def test_prompts_do_not_influence_each_other(stage, encoder, pictures):
    prompts = [['coffee'], ['page', 'astronaut'], ['chelsea'], ['coffee', 'chelsea']]
    futures = [stage.submit([ImageJob(pictures[name]) for name in names], 'auto') for names in prompts]
    for names, future in zip(prompts, futures, strict=True):
        expected = encoder.encode([pictures[name] for name in names])
        for image, tokens in zip(future.result(), expected, strict=True):
            assert image.tokens.tile_tokens == tokens.tile_tokens
            assert torch.equal(image.tokens.embeddings, tokens.embeddings.to(torch.bfloat16))


def test_limits_and_compression_of_a_single_image(stage, pictures):
    jobs = [ImageJob(pictures['coffee'], max_tiles=1, compression='all'), ImageJob(pictures['coffee'], max_tiles=2)]
    first, second = stage.submit(jobs, 'none').result()
    assert first.tokens.tile_tokens == [64]
    assert set(second.tokens.tile_tokens) == {256} and 1 < len(second.tokens.tile_tokens) <= 3


def test_a_failure_belongs_to_its_prompt(stage, pictures):
    class Broken:
        size = (10, 10)

        def load(self):
            pass

        def resize(self, size):
            raise OSError('damaged')

    bad = stage.submit([ImageJob(pictures['page']), ImageJob(Broken())], 'auto')
    good = stage.submit([ImageJob(pictures['page'])], 'auto')
    with pytest.raises(OSError, match='damaged'):
        bad.result()
    assert len(good.result()) == 1


@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_one_picture_that_is_not_read_yet_in_many_prompts(encoder, pictures, tmp_path, kind):
    pictures['coffee'].save(tmp_path / 'picture', kind)
    [expected] = encoder.encode([Image.open(tmp_path / 'picture')])
    stage = VisionStage(encoder, torch.float32, threads=8, capacity=200)
    lazy = Image.open(tmp_path / 'picture')
    for future in [stage.submit([ImageJob(lazy)] * 4, 'auto') for _ in range(4)]:
        for image in future.result():
            assert torch.equal(image.tokens.embeddings[:1], expected.embeddings[:1])
            assert image.digests == tile_digests(encoder.cut(Image.open(tmp_path / 'picture')))
    stage.close()


@pytest.fixture
def held(encoder, monkeypatch):
    """``(entered, release)``: the device is held in its first batch until released."""
    entered, release = threading.Event(), threading.Event()

    def features(tiles):
        entered.set()
        release.wait()
        return encode(tiles)

    encode = encoder.features
    monkeypatch.setattr(encoder, 'features', features)
    yield entered, release
    release.set()


def test_close_finishes_what_is_on_the_device_and_cancels_what_waits(stage, held, pictures):
    entered, release = held
    running = stage.submit([ImageJob(pictures['astronaut'], max_tiles=1)], 'auto')
    entered.wait()
    waiting = stage.submit([ImageJob(pictures['astronaut'])], 'auto')
    closing = threading.Thread(target=stage.close)
    closing.start()
    release.set()
    closing.join()
    assert len(running.result()) == 1 and waiting.cancelled()


def test_a_cancelled_prompt_leaves_the_queue(encoder, held, pictures):
    entered, release = held
    stage = VisionStage(encoder, torch.bfloat16, threads=2, capacity=1)
    jobs = [ImageJob(pictures['astronaut'], max_tiles=1)]
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
    stage = VisionStage(encoder, torch.bfloat16, threads=2, capacity=1)
    assert len(stage.submit([ImageJob(pictures['coffee'])], 'auto').result()[0].digests) > 1
    stage.close()


def test_batches_hold_tiles_of_several_prompts(make_checkpoint, pictures, monkeypatch):
    encoder = VisionEncoder.from_pretrained(make_checkpoint(), tile_batch=4)
    [alone] = encoder.encode([pictures['coffee']], 'none')
    entered, release, sizes = threading.Event(), threading.Event(), []

    def features(tiles):
        entered.set()
        release.wait()
        sizes.append(len(tiles))
        return encode(tiles)

    encode = encoder.features
    monkeypatch.setattr(encoder, 'features', features)
    stage = VisionStage(encoder, torch.float32, threads=1, capacity=200)
    first = stage.submit([ImageJob(pictures['page'], max_tiles=1)], 'none')
    entered.wait()  # in a batch of its own, since a lone request does not wait for company
    others = [stage.submit([ImageJob(pictures['coffee'])], 'none') for _ in range(2)]
    others += [stage.submit([ImageJob(pictures['chelsea'], max_tiles=1)], 'none') for _ in range(3)]
    last = stage._prepare.submit(lambda: None)
    last.result()  # the only thread has cut everything by now
    release.set()
    tiles = len(alone.tile_tokens)
    for future in others[:2]:
        assert torch.equal(future.result()[0].tokens.embeddings, alone.embeddings)
    assert [len(future.result()) for future in (first, *others[2:])] == [1] * 4
    assert sizes[0] == 1 and sum(sizes) == 1 + 2 * tiles + 3
    assert sizes[1:] == [4] * ((2 * tiles + 3) // 4) + ([(2 * tiles + 3) % 4] if (2 * tiles + 3) % 4 else [])
    stage.close()


def test_metrics(stage, pictures):
    from prometheus_client import REGISTRY

    names = {
        'vico:tiles_total': {'resolution': 'low'},
        'vico:visual_tokens_total': {},
        'vico:visual_tokens_saved_total': {},
        'vico:encoder_preprocess_seconds_count': {},
        'vico:encoder_queue_wait_seconds_count': {},
        'vico:encoder_tiles_per_batch_sum': {},
    }

    def read():
        return [REGISTRY.get_sample_value(name, labels) or 0 for name, labels in names.items()]

    before = read()
    [first, second] = stage.submit([ImageJob(pictures['coffee']), ImageJob(pictures['page'], 1)], 0.5).result()
    tile_tokens = [*first.tokens.tile_tokens, *second.tokens.tile_tokens]
    low = tile_tokens.count(64)
    assert 0 < low < len(tile_tokens)
    gained = [after - then for after, then in zip(read(), before, strict=True)]
    assert gained == [low, sum(tile_tokens), 192 * low, 2, 1, len(tile_tokens)]
