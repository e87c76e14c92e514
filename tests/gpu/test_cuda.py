"""On a CUDA device: the vision side in bfloat16, and LMDeploy's CUDA engine with visual tokens.

``VICO_TEST_DEVICE=cpu`` runs the same checks where there is no GPU, to try the tests themselves.
"""

import os

import numpy as np
import pytest
import torch
from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
from parity.judge import TOKENS, Answer
from parity.reference import Reference

from benchmarks.models import config, random_encoder
from lmdeploy_vico.stage.stage import ImageJob, VisionStage
from lmdeploy_vico.vision.encoder import PROJECTED_BATCHES, VisionEncoder
from lmdeploy_vico.vision.weights import Checkpoint

DEVICE = os.environ.get('VICO_TEST_DEVICE', 'cuda')
# Relative norm error of a float32 result computed in the vision side's dtype, and the largest error of a score.
TOLERANCE = {'cuda': (1e-2, 2e-3), 'cpu': (1e-5, 1e-5)}[torch.device(DEVICE).type]
PICTURES = ('coffee', 'page', 'chelsea', 'astronaut')

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == 'cuda' and not torch.cuda.is_available(), reason='no CUDA device'),
]


@pytest.fixture(scope='module', params=['layer_norm', 'rms_norm'])
def vit(request):
    return request.param


@pytest.fixture(scope='module')
def encoder(make_checkpoint, vit):
    return VisionEncoder.from_pretrained(make_checkpoint(vit=vit), device=DEVICE, tile_batch=4)


@pytest.mark.parametrize('compression', ['none', 'all'])
def test_embeddings_and_scores(encoder, make_checkpoint, vit, pictures, compression):
    images = [pictures[name] for name in PICTURES]
    expected = Reference(make_checkpoint(vit=vit)).encode(images, compression)
    for ours, theirs in zip(encoder.encode(images, compression), expected, strict=True):
        assert ours.tile_tokens == theirs.tile_tokens
        error = (ours.embeddings.float().cpu() - theirs.embeddings).norm() / theirs.embeddings.norm()
        assert error <= TOLERANCE[0]
        assert max(abs(a - b) for a, b in zip(ours.scores, theirs.scores, strict=True)) <= TOLERANCE[1]


def test_bit_identical_among_others(encoder, pictures, rng):
    tiles = encoder.cut(pictures['text'])
    alone = [encoder.features(tile[None]) for tile in tiles]
    for _ in range(20):
        order = rng.permutation(len(tiles))
        features = encoder.features(tiles[order])
        for place, index in enumerate(order):
            assert torch.equal(features.patches[place], alone[index].patches[0])
            assert torch.equal(features.scores[place], alone[index].scores[0])
        compressed = torch.from_numpy(rng.integers(0, 2, len(tiles)).astype(bool))
        for place, tokens in enumerate(encoder.project(features.patches, compressed)):
            [expected] = encoder.project(alone[order[place]].patches, compressed[place : place + 1])
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
        for place, tokens in enumerate(encoder.project(features.patches, compressed)):
            one = alone[order[place]]
            assert torch.equal(features.patches[place], one.patches[0])
            assert torch.equal(features.scores[place], one.scores[0])
            [expected] = encoder.project(one.patches, compressed[place : place + 1])
            assert torch.equal(tokens, expected)


def test_a_graph_and_single_launches_agree(encoder, make_checkpoint, vit, pictures):
    eager = VisionEncoder.load(
        Checkpoint(make_checkpoint(vit=vit)), encoder.config, device=DEVICE, tile_batch=4, graph=False
    )
    for name in PICTURES:
        tiles = encoder.cut(pictures[name])
        ours, theirs = encoder.features(tiles), eager.features(tiles)
        assert torch.equal(ours.scores, theirs.scores)
        assert all(torch.equal(a, b) for a, b in zip(ours.patches, theirs.patches, strict=True))


def test_stage_under_load(encoder, pictures, rng):
    """Many prompts at once: each gets bit for bit what it gets alone, and device memory stays as it was."""
    expected = {name: encoder.encode([pictures[name]]) for name in PICTURES}
    encoder.warm_up()
    stage = VisionStage([encoder], encoder.dtype, threads=4)
    reserved = torch.cuda.memory_reserved() if DEVICE == 'cuda' else 0
    for _ in range(3):
        names = rng.choice(PICTURES, 16)
        futures = [stage.submit([ImageJob(pictures[name])], 'auto') for name in names]
        for name, future in zip(names, futures, strict=True):
            [image] = future.result()
            assert image.tokens.tile_tokens == expected[name][0].tile_tokens
            assert torch.equal(image.tokens.embeddings, expected[name][0].embeddings)
    stage.close()
    if DEVICE == 'cuda':
        assert torch.cuda.memory_reserved() == reserved


def test_no_group_takes_more_device_memory_than_at_the_start(encoder, pictures):
    """Among them those of one tile of a kind, which need one projector batch more than others do."""
    encoder.warm_up()
    patches = encoder.features(encoder.cut(pictures['astronaut'])[:1]).patches
    reserved = torch.cuda.memory_reserved() if DEVICE == 'cuda' else 0
    most = PROJECTED_BATCHES * encoder.tile_batch
    for tiles in (most, most - 1, most // 2, 3, 1):
        for full in range(tiles + 1):
            projected = encoder.project(patches * tiles, torch.arange(tiles) >= full)
            assert [len(tokens) for tokens in projected] == [256] * full + [64] * (tiles - full)
    if DEVICE == 'cuda':
        assert torch.cuda.memory_reserved() == reserved


@pytest.mark.parametrize('llm', ['dense', 'moe'])
@pytest.mark.parametrize(
    'options',
    [{}, {'enable_prefix_caching': True, 'max_prefill_token_num': 512}, {'block_size': 128}],
    ids=['default', 'prefix caching and chunks', 'blocks of 128'],
)
def test_engine(make_checkpoint, prompts, judge, llm, options):
    # The vision side in float32, so that what is judged is the engine's placing of the visual tokens.
    vico = {'vico': {'vision_device': 'cpu'}}
    config = PytorchEngineConfig(session_len=16384, hf_overrides=vico, **options)
    greedy = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, ignore_eos=True)
    with pipeline(str(make_checkpoint(llm=llm)), backend_config=config) as pipe:
        for _ in range(2):  # the second time from the prefix cache, where it is on
            answers = pipe(list(prompts.values()), gen_config=greedy)
            for (name, messages), answer in zip(prompts.items(), answers, strict=True):
                given = Answer(tuple(answer.token_ids), answer.input_token_len)
                judge(llm=llm).check(messages, given, name=name)
