"""On a CUDA device: the vision side in bfloat16, and LMDeploy's CUDA engine with visual tokens.

``VICO_TEST_DEVICE=cuda`` lets tests see the GPU; ``VICO_TEST_DEVICE=cpu`` runs the same checks without one, to try the
tests themselves.
"""

import os

import numpy as np
import pytest
import torch
from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
from parity.judge import TOKENS, Answer
from parity.reference import Reference

from benchmarks.lib.models import config, random_encoder
from lmdeploy_vico.checkpoints.files import Checkpoint
from lmdeploy_vico.checkpoints.random.limits import TINY_ENGINE
from lmdeploy_vico.stage.jobs import ImageJob
from lmdeploy_vico.stage.stage import VisionStage
from lmdeploy_vico.vision.encoder import VisionEncoder
from lmdeploy_vico.vision.model.tower import VisionTower
from lmdeploy_vico.vision.projection import PROJECTED_BATCHES
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import Tiling, cut_grid

DEVICE = os.environ.get('VICO_TEST_DEVICE', 'cuda')
# What rounding to bfloat16 does to the vision side is measured in the test itself, with the independent implementation
# in bfloat16 on the CPU: patch tokens and embeddings are 1.5e-2 to 2.2e-2 off its float32 results. Ours, which sum the
# same operands in another order, may be off by so much more; on a CPU they were off by 0.95 to 1.02 times as much.
ROUNDING = 1.25
# Scores against the float32 router on the same patch tokens: the split operands of `kernels/linear.py` leave 2e-5.
ROUTER = 1e-4
PICTURES = ('coffee', 'page', 'chelsea', 'astronaut')

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == 'cuda' and not torch.cuda.is_available(),
        reason='no CUDA device, or hidden: VICO_TEST_DEVICE=cuda shows it',
    ),
]


@pytest.fixture(scope='module', params=['layer_norm', 'rms_norm'])
def vit(request):
    return request.param


@pytest.fixture(scope='module')
def encoder(make_checkpoint, vit):
    return TileEncoder.from_pretrained(make_checkpoint(vit=vit), device=DEVICE, tile_batch=4)


@pytest.fixture(scope='module')
def references(make_checkpoint, vit):
    """The independent implementation in float32, and the same rounded to bfloat16."""
    return Reference(make_checkpoint(vit=vit)), Reference(make_checkpoint(vit=vit), torch.bfloat16)


@pytest.fixture(scope='module')
def rounded(encoder, make_checkpoint, vit):
    """The vision side in bfloat16: on a CPU it would be served in float32."""
    if encoder.dtype == torch.bfloat16:
        return encoder
    tower = VisionTower(encoder.config).bfloat16()
    Checkpoint(make_checkpoint(vit=vit)).load_into(tower)
    tower.freeze()
    return TileEncoder(tower, encoder.config, tile_batch=4)


def tiles_of(image, config):
    return cut_grid(image, Tiling.of(config).grid(image.size))


def off(values, expected):
    return ((values.float().cpu() - expected.float()).norm() / expected.float().norm()).item()


@torch.inference_mode()
def test_patch_tokens_embeddings_and_scores_are_as_exact_as_bfloat16_is(rounded, references, pictures):
    exact, plain = references
    errors = {'ours': [], 'plain': []}  # of scores
    for name in PICTURES:
        tiles = tiles_of(pictures[name], rounded.config)
        ours, expected, theirs = rounded.features(tiles), exact.features(tiles), plain.features(tiles)
        patches = torch.stack([tile.float().cpu() for tile in ours.patches])
        assert off(patches, expected) <= ROUNDING * off(theirs, expected), name
        scores = ours.scores.cpu()
        assert (scores - torch.tensor(exact.scores(patches))).abs().max() <= ROUTER, name
        errors['ours'] += (scores - torch.tensor(exact.scores(expected))).tolist()
        errors['plain'] += (torch.tensor(plain.scores(theirs)) - torch.tensor(exact.scores(expected))).tolist()
        for compressed in (False, True):
            embeddings = torch.cat(rounded.projection.by_tile(ours.patches, torch.full([len(tiles)], compressed)))
            right, others = (
                torch.cat([side.project(tile, compressed) for tile in features])
                for side, features in ((exact, expected), (plain, theirs))
            )
            assert off(embeddings, right) <= ROUNDING * off(others, right), (name, compressed)
    # The plain router rounds its activations too.
    assert np.square(errors['ours']).mean() <= np.square(errors['plain']).mean()


@pytest.mark.skipif(DEVICE != 'cpu', reason='the vision side is in float32 on a CPU only')
@pytest.mark.parametrize('compression', ['none', 'all'])
def test_embeddings_and_scores_in_float32(encoder, references, pictures, compression):
    images = [pictures[name] for name in PICTURES]
    for ours, theirs in zip(
        VisionEncoder(encoder).encode(images, compression), references[0].encode(images, compression), strict=True
    ):
        assert ours.tile_tokens == theirs.tile_tokens
        assert off(ours.embeddings, theirs.embeddings) <= 1e-5
        assert max(abs(a - b) for a, b in zip(ours.scores, theirs.scores, strict=True)) <= 1e-5


def test_bit_identical_among_others(encoder, pictures, rng):
    tiles = tiles_of(pictures['text'], encoder.config)
    alone = [encoder.features(tile[None]) for tile in tiles]
    for _ in range(20):
        order = rng.permutation(len(tiles))
        features = encoder.features(tiles[order])
        for place, index in enumerate(order):
            assert torch.equal(features.patches[place], alone[index].patches[0])
            assert torch.equal(features.scores[place], alone[index].scores[0])
        compressed = torch.from_numpy(rng.integers(0, 2, len(tiles)).astype(bool))
        for place, tokens in enumerate(encoder.projection.by_tile(features.patches, compressed)):
            [expected] = encoder.projection.by_tile(alone[order[place]].patches, compressed[place : place + 1])
            assert torch.equal(tokens, expected)


@pytest.mark.skipif(DEVICE == 'cpu', reason='minutes on a CPU')
@pytest.mark.parametrize('like', ['300M', '6B'])
def test_bit_identical_at_published_widths(like, rng):
    """Libraries choose other kernels for large products; two layers of the ViT show it as well as all."""
    encoder, _ = random_encoder(config(like, layers=2), torch.device(DEVICE), keep=False)
    tiles = rng.integers(0, 256, (3 * encoder.tile_batch, 448, 448, 3), dtype=np.uint8)
    alone = [encoder.features(tile[None]) for tile in tiles]
    for _ in range(10):
        order = rng.permutation(len(tiles))
        features = encoder.features(tiles[order])
        compressed = torch.from_numpy(rng.integers(0, 2, len(tiles)).astype(bool))
        for place, tokens in enumerate(encoder.projection.by_tile(features.patches, compressed)):
            one = alone[order[place]]
            assert torch.equal(features.patches[place], one.patches[0])
            assert torch.equal(features.scores[place], one.scores[0])
            [expected] = encoder.projection.by_tile(one.patches, compressed[place : place + 1])
            assert torch.equal(tokens, expected)


def test_a_graph_and_single_launches_agree(encoder, make_checkpoint, vit, pictures):
    eager = TileEncoder.load(
        Checkpoint(make_checkpoint(vit=vit)), encoder.config, device=DEVICE, tile_batch=4, graph=False
    )
    for name in PICTURES:
        tiles = tiles_of(pictures[name], encoder.config)
        ours, theirs = encoder.features(tiles), eager.features(tiles)
        assert torch.equal(ours.scores, theirs.scores)
        assert all(torch.equal(a, b) for a, b in zip(ours.patches, theirs.patches, strict=True))


def device_memory():
    """Bytes of device memory that tensors have, and that PyTorch holds; nothing on a CPU."""
    if DEVICE != 'cuda':
        return 0, 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def test_stage_under_load(encoder, pictures, rng):
    """Many prompts at once: each gets bit for bit what it gets alone, and no tensor stays on the device.

    The first round takes what stays: workspaces of the libraries for the device's thread.
    """
    expected = {name: VisionEncoder(encoder).encode([pictures[name]]) for name in PICTURES}
    jobs = {name: ImageJob(pictures[name], Tiling.of(encoder.config).grid(pictures[name].size)) for name in PICTURES}
    stage, names, after = VisionStage([encoder], encoder.dtype, threads=4), rng.choice(PICTURES, 16), []
    for _ in range(3):
        futures = [stage.submit([jobs[name]], 'auto') for name in names]
        for name, future in zip(names, futures, strict=True):
            [image] = future.result()
            assert image.tokens.tile_tokens == expected[name][0].tile_tokens
            assert torch.equal(image.tokens.embeddings, expected[name][0].embeddings)
        after.append(device_memory()[0])
    stage.close()
    assert after[1] == after[2]


def test_the_same_groups_again_take_no_more_device_memory(encoder):
    """Among them those of one tile of a kind, which need one projector batch more than others do.

    PyTorch splits and rounds what it holds, so that the first rounds may take more: the third must not.
    """
    encoder.warm_up()
    patches = encoder.features(np.zeros((1, 448, 448, 3), np.uint8)).patches
    most, reserved = PROJECTED_BATCHES * encoder.tile_batch, []
    for _ in range(3):
        for tiles in (most, most - 1, most // 2, 3, 1):
            for full in range(tiles + 1):
                projected = encoder.projection.by_tile(patches * tiles, torch.arange(tiles) >= full)
                assert [len(tokens) for tokens in projected] == [256] * full + [64] * (tiles - full)
        reserved.append(device_memory()[1])
    assert reserved[2] == reserved[1]


@pytest.mark.server
@pytest.mark.parametrize('llm', ['dense', 'moe'])
@pytest.mark.parametrize(
    'options',
    [{}, {'enable_prefix_caching': True, 'max_prefill_token_num': 512}, {'block_size': 128}],
    ids=['default', 'prefix caching and chunks', 'blocks of 128'],
)
def test_engine(make_checkpoint, prompts, judge, llm, options):
    # The vision side in float32, so that what is judged is the engine's placing of the visual tokens.
    vico = {'vico': {'vision_device': 'cpu'}}
    config = PytorchEngineConfig(**TINY_ENGINE, session_len=16384, hf_overrides=vico, **options)
    greedy = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, ignore_eos=True)
    with pipeline(str(make_checkpoint(llm=llm)), backend_config=config) as pipe:
        for _ in range(2):  # the second time from the prefix cache, where it is on
            answers = pipe(list(prompts.values()), gen_config=greedy)
            for (name, messages), answer in zip(prompts.items(), answers, strict=True):
                given = Answer(tuple(answer.token_ids), answer.input_token_len)
                judge(llm=llm).check(messages, given, name=name)
