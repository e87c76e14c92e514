"""A stage on the real encoder of a tiny checkpoint: bits are the same alone, in company and over pinned memory.

These are slow; what does not depend on real features is tested on a stand-in, in the other files.
"""

import threading

import pytest
import torch
from stage.sharing import require_shared_batches
from waiting import HANG

from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import Tiling, cut_grid, tile_digests

pytestmark = pytest.mark.busy(times=2)


def job(image, max_tiles=12):
    """What a request for this image becomes; the tiny checkpoint allows 12 tiles."""
    return ImageJob(image, Tiling(1, max_tiles).grid(image.size))


@pytest.fixture(scope='module')
def encoder(make_checkpoint):
    return TileEncoder.from_pretrained(make_checkpoint())


@pytest.fixture
def stage(encoder):
    stage = VisionStage([encoder], torch.bfloat16, threads=2, capacity=200)
    yield stage
    stage.close()


def test_hands_on_the_encoders_tokens_in_the_language_models_dtype(stage, encoder, pictures):
    [image] = stage.submit([job(pictures['coffee'])], 'auto').result()
    [expected] = VisionEncoder(encoder).encode([pictures['coffee']])
    assert torch.equal(image.tokens.embeddings, expected.embeddings.to(torch.bfloat16))
    assert image.tokens.tile_tokens == expected.tile_tokens
    assert image.digests == tile_digests(cut_grid(pictures['coffee'], job(pictures['coffee']).grid))


def test_prompts_do_not_influence_each_other(stage, encoder, pictures):
    prompts = [['coffee'], ['page', 'astronaut'], ['chelsea'], ['coffee', 'chelsea']]
    futures = [stage.submit([job(pictures[name]) for name in names], 'auto') for names in prompts]
    for names, future in zip(prompts, futures, strict=True):
        expected = VisionEncoder(encoder).encode([pictures[name] for name in names])
        for image, tokens in zip(future.result(), expected, strict=True):
            assert image.tokens.tile_tokens == tokens.tile_tokens
            assert torch.equal(image.tokens.embeddings, tokens.embeddings.to(torch.bfloat16))


def test_batches_hold_tiles_of_several_prompts(make_checkpoint, pictures, monkeypatch):
    encoder = TileEncoder.from_pretrained(make_checkpoint(), tile_batch=4)
    require_shared_batches(encoder, VisionEncoder(encoder).encode, job, pictures, monkeypatch)


def test_a_repeated_image_has_the_same_bits_whatever_its_compression(encoder, pictures):
    stage = VisionStage([encoder], torch.float32, threads=2, cache_bytes=2**30)
    for value in ('auto', 'none', 'all', 0.5):
        [image] = stage.submit([job(pictures['coffee'])], value).result()
        [expected] = VisionEncoder(encoder).encode([pictures['coffee']], value)
        assert image.tokens.tile_tokens == expected.tile_tokens and image.tokens.scores == expected.scores
        assert torch.equal(image.tokens.embeddings, expected.embeddings)
    stage.close()


def test_several_devices_give_the_same_bits(make_checkpoint, pictures):
    encoders = [TileEncoder.from_pretrained(make_checkpoint()) for _ in range(2)]
    stage = VisionStage(encoders, torch.float32, threads=2)
    [image] = stage.submit([job(pictures['coffee'])], 'auto').result()
    [expected] = VisionEncoder(encoders[0]).encode([pictures['coffee']])
    assert torch.equal(image.tokens.embeddings, expected.embeddings)
    stage.close()


def test_as_many_threads_as_where_the_encoder_was_made(encoder, pictures, monkeypatch):
    """An engine in the same process may leave PyTorch with another number for threads to come."""
    numbers, start = [], encoder.start

    def counted(tiles):
        numbers.append(torch.get_num_threads())
        return start(tiles)

    monkeypatch.setattr(encoder, 'start', counted)
    before = torch.get_num_threads()
    other = threading.Thread(target=torch.set_num_threads, args=[before + 1])
    other.start()
    other.join()
    stage = VisionStage([encoder], torch.float32, threads=1)
    stage.submit([job(pictures['astronaut'], 1)], 'auto').result()
    stage.close()
    torch.set_num_threads(before)
    assert set(numbers) == {before}


def test_pinned_memory_and_batches_of_two_give_the_same_bits(encoder, make_checkpoint, cuda, pictures):
    """On stand-ins for CUDA's parts."""
    stage = VisionStage(
        [cuda.encoder(TileEncoder.from_pretrained(make_checkpoint(), tile_batch=2))], torch.float32, threads=2
    )
    [expected] = VisionEncoder(encoder).encode([pictures['coffee']])
    [image] = stage.submit([job(pictures['coffee'])], 'auto').result(HANG)
    assert image.tokens.tile_tokens == expected.tile_tokens and image.tokens.scores == expected.scores
    assert torch.equal(image.tokens.embeddings, expected.embeddings)
    assert stage._memory._rows.owns(image.tokens.embeddings)
    stage.close()
