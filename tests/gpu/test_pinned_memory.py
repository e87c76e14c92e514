"""On a CUDA device: what a stage pins at its start is all that it ever pins, and its results lie in it."""

import pytest
import torch
from waiting import HANG

from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import Tiling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]


def test_nothing_is_pinned_after_the_start(make_checkpoint, pictures):
    encoder = TileEncoder.from_pretrained(make_checkpoint(), device='cuda', tile_batch=4)
    expected = {name: VisionEncoder(encoder).encode([pictures[name]])[0] for name in pictures}
    jobs = {name: ImageJob(one, Tiling.of(encoder.config).grid(one.size)) for name, one in pictures.items()}
    stage = VisionStage([encoder], encoder.dtype, threads=4, cache_bytes=2**28)
    for arena in (stage._memory._tiles, stage._memory._rows):
        arena._thread.join()

    def ask():
        futures = {name: stage.submit([job], 'auto') for name, job in jobs.items()}
        for name, future in futures.items():
            [image] = future.result(HANG)
            assert image.tokens.tile_tokens == expected[name].tile_tokens
            assert torch.equal(image.tokens.embeddings, expected[name].embeddings)
            assert image.tokens.embeddings.is_pinned()

    pinned = torch.cuda.host_memory_stats()['allocated_bytes.allocated']
    for _ in range(5):
        ask()
    grown = torch.cuda.host_memory_stats()['allocated_bytes.allocated'] - pinned
    tile = 1024 * encoder.config.vision.hidden_size * encoder.dtype.itemsize
    assert grown < tile  # tables of `pack`, a few hundred bytes each
    stage.close()
