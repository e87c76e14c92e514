"""The cases of ``benchmarks/gates/check.py``: what the plugin does to a request, each against a fixed reference.

A reference is work that no change of the plugin makes faster or slower: Pillow's, hashlib's, torch's, never our own. It
takes turns with ours in one process, so that the clocks and the age of a machine cancel in the ratio of their wall
times. A round is the median ratio of some turns that follow each other. Neighbours do not cancel: a reference that has
every core suffers more from them than work that waits now and then. So each round says how many cores they used.
"""

import hashlib
import pickle
import pkgutil

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.lib import images, models
from benchmarks.lib.timing import Reference
from lmdeploy_vico.adapter.server import prompt
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.stage.jobs import EncodedImage, ImageJob
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.vision import tiling
from lmdeploy_vico.vision.projection import VisualTokens

RECIPE = 2  # one more with every change of a case or a reference: results of another one are not compared
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device('cuda'), torch.bfloat16) if CUDA else (torch.device('cpu'), torch.float32)
ROUNDS = 5
WARM_UP = 2  # turns
TILES = 10  # of a prompt, as in the paper
LLM_WIDTH, KV_BLOCK = 4096, 64
PROMPTS, THREADS, COMPRESSION = 8, 2, 0.5
SIZE = images.SIZE if CUDA else (896, 448)  # of a picture that is encoded: ten tiles, or three
SIDE, PRODUCTS = (8192, 8) if CUDA else (1024, 4)  # of matrices, which take about as long as encoding such a picture


@pytest.fixture
def against(benchmark, pytestconfig):
    """``against(ours, reference)``: time both in turns; what is called returns when its work is done."""

    def run(ours, reference):
        turns = pytestconfig.getoption('turns')
        timer = pkgutil.resolve_name(pytestconfig.getoption('benchmark_timer'))  # pytest-benchmark's own
        beside = Reference(reference, timer, turns, WARM_UP)
        benchmark.pedantic(ours, setup=beside, rounds=ROUNDS * turns, warmup_rounds=WARM_UP)
        ratios, neighbours = beside.rounds(benchmark.stats.stats.data)
        benchmark.extra_info.update(ratios=ratios, neighbours=neighbours)

    return run


@pytest.fixture(scope='module')
def encoder(pytestconfig):
    """A vision side with random weights, of a published size on a GPU."""
    return models.random_encoder(models.config(pytestconfig.getoption('like')), DEVICE, keep=False)[0]


@pytest.fixture(scope='module')
def multiply():
    """Products of large matrices, the reference for a picture that is encoded."""
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=DTYPE) for _ in range(2))

    def run():
        for _ in range(PRODUCTS):
            a @ b
        if CUDA:
            torch.cuda.synchronize()

    return run


def noise(width, height, seed=0):
    """A picture of which no tile looks like another."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_cutting(against):
    """A picture of ten tiles, against Pillow's two resizes of it."""
    picture = noise(*images.SIZE)

    def resizes():
        picture.resize((1344, 1344))
        picture.resize((448, 448))

    against(lambda: tiling.cut_tiles(picture, 1, 12), resizes)


def test_digests(against):
    """The digests of ten tiles, against one BLAKE2b of all their pixels."""
    tiles = tiling.cut_tiles(noise(*images.SIZE), 1, 12)
    against(lambda: tiling.tile_digests(tiles), lambda: hashlib.blake2b(tiles.data))


def test_encoding(against, encoder, multiply):
    """A prompt of one picture encoded, scored, routed and projected, half of it compressed, against matrix products."""
    tiles = [tiling.cut_tiles(noise(*SIZE), 1, 12)]
    against(lambda: encoder.encode_tiles(tiles, COMPRESSION), multiply)


def test_stage(against, encoder, multiply):
    """Eight prompts at a time through the stage, against a resize by Pillow and matrix products for each."""
    pictures = [noise(*SIZE, seed) for seed in range(PROMPTS)]
    jobs = [ImageJob(picture, tiling.Tiling.of(encoder.config).grid(picture.size)) for picture in pictures]
    stage = VisionStage([encoder], DTYPE, THREADS)  # without a cache, or nothing would be encoded twice

    def ours():
        for future in [stage.submit([job], COMPRESSION) for job in jobs]:
            future.result()

    def reference():
        for picture in pictures:
            picture.resize(SIZE)
            multiply()

    try:
        against(ours, reference)
    finally:
        stage.close()


def test_hand_over(against):
    """A prompt of ten tiles assembled, pickled and unpickled, against copies of the bytes of its visual tokens."""
    tile_tokens = [TOKENS_COMPRESSED, TOKENS_FULL] * (TILES // 2)
    embeddings = torch.randn(sum(tile_tokens), LLM_WIDTH).to(torch.bfloat16)
    digests = [bytes([tile]) * tiling.DIGEST_SIZE for tile in range(TILES)]
    data = embeddings.view(torch.uint8).numpy().tobytes()  # copied as bytes: by one thread, as ours are
    image = EncodedImage(VisualTokens(embeddings, tile_tokens, [0.5] * TILES), digests)

    def send():
        ids, spans = prompt.assemble([[1] * 20, [2] * 64], [image], 0, KV_BLOCK)
        for span in pickle.loads(pickle.dumps((ids, spans)))[1]:
            span.embeddings.tensor()

    against(send, lambda: [bytearray(data) for _ in range(4)])
