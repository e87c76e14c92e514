import threading

import pytest
import torch
from PIL import Image

from lmdeploy_vico.stage.stage import ImageJob, VisionStage
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.tiling import tile_digests


@pytest.fixture(scope='module')
def encoder(make_checkpoint):
    return VisionEncoder.from_pretrained(make_checkpoint())


@pytest.fixture
def stage(encoder):
    stage = VisionStage(encoder, torch.bfloat16, threads=2)
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
    stage = VisionStage(encoder, torch.float32, threads=8)
    lazy = Image.open(tmp_path / 'picture')
    for future in [stage.submit([ImageJob(lazy)] * 4, 'auto') for _ in range(4)]:
        for image in future.result():
            assert torch.equal(image.tokens.embeddings[:1], expected.embeddings[:1])
            assert image.digests == tile_digests(encoder.cut(Image.open(tmp_path / 'picture')))
    stage.close()


def test_close_cancels_what_is_queued(encoder, pictures, monkeypatch):
    stage = VisionStage(encoder, torch.bfloat16, threads=1)
    entered, release = threading.Event(), threading.Event()

    def blocked(image, max_tiles):
        entered.set()
        release.wait()
        return cut(image, max_tiles)

    cut = encoder.cut
    monkeypatch.setattr(encoder, 'cut', blocked)
    running = stage.submit([ImageJob(pictures['astronaut'])], 'auto')
    queued = stage.submit([ImageJob(pictures['astronaut'])], 'auto')
    entered.wait()
    stage.close()
    release.set()
    assert queued.cancelled() and len(running.result()) == 1
