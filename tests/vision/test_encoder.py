"""VisionEncoder: the contract, and that a tile's result depends on its pixels alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy_vico.config import UnsupportedCheckpointError, VicoConfig
from lmdeploy_vico.vision.encoder import VisionEncoder, default_dtype, default_tile_batch, saturate
from lmdeploy_vico.vision.model.intern_vit import InternVisionModel


@pytest.fixture(scope='module', params=['layer_norm', 'rms_norm'])
def encoder(request, make_checkpoint):
    return VisionEncoder.from_pretrained(make_checkpoint(vit=request.param))


def random_tiles(rng, count):
    return rng.integers(0, 256, (count, 448, 448, 3), dtype=np.uint8)


def test_computes_in_float32_on_a_cpu(make_checkpoint):
    encoder = VisionEncoder.from_pretrained(make_checkpoint(), device='cpu', dtype=torch.bfloat16)
    assert encoder.dtype == torch.float32 and encoder.device.type == 'cpu'


def test_pixels_are_normalised_in_float32_whatever_the_dtype(make_checkpoint):
    model = InternVisionModel(VicoConfig.from_pretrained(make_checkpoint()).vision).to(torch.bfloat16)
    for _ in ('computed', 'kept'):
        assert {statistic.dtype for statistic in model.embeddings.statistics()} == {torch.float32}
        model.freeze()


def test_one_result_per_image(encoder, pictures):
    images = [pictures['coffee'], pictures['astronaut'], pictures['page']]
    results = encoder.encode(images)
    assert len(results) == 3
    for image, result in zip(images, results, strict=True):
        assert len(result.tile_tokens) == len(result.scores) == len(encoder.cut(image))
        assert set(result.tile_tokens) <= {64, 256}
        assert result.embeddings.shape == (sum(result.tile_tokens), encoder.config.llm_hidden_size)
        assert all(0 <= score <= 1 for score in result.scores)


def test_no_images(encoder):
    assert encoder.encode([]) == []


@pytest.mark.parametrize('compression, tokens', [('none', {256}), ('all', {64}), (0.0, {256}), (1.0, {64})])
def test_compression_of_everything_or_nothing(encoder, pictures, compression, tokens):
    [result] = encoder.encode([pictures['coffee']], compression)
    assert set(result.tile_tokens) == tokens


def test_fraction_takes_the_highest_scores(encoder, pictures):
    [result] = encoder.encode([pictures['coffee']], 0.3)
    compressed = [score for score, n in zip(result.scores, result.tile_tokens, strict=True) if n == 64]
    assert sorted(compressed) == sorted(result.scores)[-2:]  # 0.3 * 7 tiles, rounded


def test_groups_are_routed_by_themselves(encoder, pictures):
    tiles = [encoder.cut(pictures[name]) for name in ('coffee', 'page', 'chelsea')]
    together = encoder.encode_tiles([tiles[0], tiles[2]])
    counts = [len(image) for image in tiles]
    mixed = encoder.visual_tokens(encoder.features(np.concatenate(tiles)), counts, [([0, 2], 'auto'), ([1], 'all')])
    assert [mixed[0].tile_tokens, mixed[2].tile_tokens] == [result.tile_tokens for result in together]
    assert torch.equal(mixed[0].embeddings, together[0].embeddings)
    assert set(mixed[1].tile_tokens) == {64}


def test_embeddings_in_another_dtype(encoder, pictures):
    [expected] = encoder.encode([pictures['astronaut']])
    features = encoder.features(encoder.cut(pictures['astronaut']))
    [rounded] = encoder.visual_tokens(features, [len(expected.tile_tokens)], [([0], 'auto')], torch.bfloat16)
    assert torch.equal(rounded.embeddings, expected.embeddings.to(torch.bfloat16))


def test_unknown_compression(encoder, pictures):
    with pytest.raises(ValueError, match='must be "auto"'):
        encoder.encode([pictures['astronaut']], 'half')


def test_wrong_tiles(encoder):
    with pytest.raises(ValueError, match='tiles: expected uint8'):
        encoder.features(np.zeros((1, 448, 448, 3), dtype=np.float32))


@pytest.mark.parametrize('tile_batch', [1, 3, 4])
def test_bit_identical_alone_or_among_others(make_checkpoint, rng, tile_batch):
    encoder = VisionEncoder.from_pretrained(make_checkpoint(), tile_batch=tile_batch)
    tiles = random_tiles(rng, 7)
    alone = [encoder.features(tile[None]) for tile in tiles]
    for _ in range(3):
        order = rng.permutation(len(tiles))
        features = encoder.features(tiles[order])
        for place, index in enumerate(order):
            assert torch.equal(features.patches[place], alone[index].patches[0])
            assert torch.equal(features.scores[place], alone[index].scores[0])
        mask = torch.from_numpy(rng.integers(0, 2, len(tiles)).astype(bool))
        for place, tokens in enumerate(encoder.project(features.patches, mask)):
            [expected] = encoder.project(alone[order[place]].patches, mask[place : place + 1])
            assert torch.equal(tokens, expected)


def test_bit_identical_in_two_hundred_random_batches(make_checkpoint, rng):
    encoder = VisionEncoder.from_pretrained(make_checkpoint(), tile_batch=4)
    tiles = random_tiles(rng, 12)
    tiles[6:] = tiles[:6] ^ 1  # scores as close as can be
    alone = [encoder.start([tile]).wait() for tile in tiles]
    for _ in range(200):
        chosen = rng.choice(len(tiles), rng.integers(1, 5))
        features = encoder.start(list(tiles[chosen])).wait()
        for place, index in enumerate(chosen):
            assert torch.equal(features.patches[place], alone[index].patches[0])
            assert torch.equal(features.scores[place], alone[index].scores[0])


def test_only_the_routed_branch_is_computed(encoder, pictures, monkeypatch):
    calls = []
    project = encoder.tower.project

    def record(patches, compressed):
        calls.append(compressed)
        return project(patches, compressed)

    monkeypatch.setattr(encoder.tower, 'project', record)
    [result] = encoder.encode([pictures['coffee']])
    assert calls.count(True) == result.tile_tokens.count(64)
    assert calls.count(False) == result.tile_tokens.count(256)


@pytest.mark.parametrize('tile_batch, rooms', [(1, 9), (4, 17)])
def test_warming_up_projects_every_division_into_batches(make_checkpoint, monkeypatch, tile_batch, rooms):
    encoder = VisionEncoder.from_pretrained(make_checkpoint(), tile_batch=tile_batch)
    seen, shuffle = set(), encoder.tower.shuffle

    def record(patches, compressed, room):
        seen.add(room)
        return shuffle(patches, compressed, room)

    monkeypatch.setattr(encoder.tower, 'shuffle', record)
    encoder.warm_up()
    warmed = seen.copy()
    [patches] = encoder.features(np.zeros((1, 448, 448, 3), np.uint8)).patches
    tiles = 8 * tile_batch
    for full in range(tiles + 1):
        encoder.project([patches] * tiles, torch.arange(tiles) >= full)
    assert seen == warmed and len(seen) == rooms


@pytest.mark.parametrize('failures, usable', [(0, True), (1, True), (9, False)])
def test_whether_a_device_answers(encoder, monkeypatch, failures, usable):
    assert encoder.usable()
    left = iter(range(failures))

    def synchronize(device):
        if next(left, None) is not None:
            raise RuntimeError('an illegal memory access')

    monkeypatch.setattr(encoder, 'device', torch.device('cuda'))
    monkeypatch.setattr(torch.cuda, 'synchronize', synchronize)
    assert encoder.usable() is usable


def test_tile_batch_by_width_and_device(make_checkpoint):
    config = VicoConfig.from_pretrained(make_checkpoint())
    assert default_tile_batch(config, torch.device('cpu')) == 1
    assert default_tile_batch(config, torch.device('cuda')) == 8


def damaged(checkpoint, tmp_path, change):
    path = shutil.copytree(checkpoint, tmp_path / 'damaged')
    for shard in path.glob('*.safetensors'):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard)
    return path


def test_every_missing_or_misshapen_tensor_is_named(make_checkpoint, tmp_path):
    def change(tensors):
        tensors.pop('mlp2.4.weight', None)
        tensors.pop('gating.block3.0.bias', None)
        if 'mlp1.1.bias' in tensors:
            tensors['mlp1.1.bias'] = torch.zeros(3)

    path = damaged(make_checkpoint(), tmp_path, change)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        VisionEncoder.from_pretrained(path)
    message = str(caught.value)
    assert 'missing tensors: gating.block3.0.bias, mlp2.4.weight' in message
    assert 'mlp1.1.bias is [3], expected' in message


def test_tensors_that_inference_does_not_use_are_not_required(make_checkpoint, tmp_path):
    def change(tensors):
        for name in list(tensors):
            if '.attn3.' in name or '.norm4.' in name:
                del tensors[name]

    VisionEncoder.from_pretrained(damaged(make_checkpoint(), tmp_path, change))


def test_missing_shard(make_checkpoint, tmp_path):
    path = shutil.copytree(make_checkpoint(), tmp_path / 'copy')
    shard = sorted(path.glob('*.safetensors'))[0]
    shard.unlink()
    with pytest.raises(UnsupportedCheckpointError, match=shard.name):
        VisionEncoder.from_pretrained(path)


def test_no_weights(make_checkpoint, tmp_path):
    shutil.copy(make_checkpoint() / 'config.json', tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match=r'neither model\.safetensors\.index\.json nor'):
        VisionEncoder.from_pretrained(tmp_path)


def test_not_a_vico_checkpoint(make_checkpoint):
    with pytest.raises(UnsupportedCheckpointError, match='not a ViCO'):
        VisionEncoder.from_pretrained(make_checkpoint(flash=False))


@pytest.mark.parametrize(
    'change, message',
    [
        ({'ps_version': 'v1'}, "ps_version is 'v1' in config.json; only 'v2' is supported"),
        ({'select_layer': -4}, 'select_layer is -4'),
        ({'flash_relative_threshold': None}, 'flash_relative_threshold is None'),
        ({'force_image_size': 224}, 'force_image_size is 224'),
    ],
)
def test_unsupported_configs_say_why(make_checkpoint, change, message):
    config = json.loads((make_checkpoint() / 'config.json').read_text())
    with pytest.raises(UnsupportedCheckpointError, match=message):
        VicoConfig.from_dict(config | change)


@pytest.mark.parametrize(
    'device, capability, dtype',
    [
        ('cpu', None, torch.float32),
        ('cuda', (7, 5), torch.float16),
        ('cuda', (8, 0), torch.bfloat16),
        ('cuda:1', (9, 0), torch.bfloat16),
    ],
)
def test_float16_is_taken_only_where_there_is_no_bfloat16(monkeypatch, device, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert default_dtype(torch.device(device)) == dtype


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_what_float16_cannot_hold_becomes_its_largest(dtype):
    kept = [0.0, -1.5, 65280.0, -65280.0, 2.0**-14]
    values = torch.tensor([*kept, 65536.0, -1e38, torch.inf], dtype=dtype)
    largest = 65504.0 if dtype == torch.float32 else 65280.0
    found = saturate(values.clone(), torch.float16).to(torch.float16)
    assert found.tolist() == [*kept, largest, -largest, largest]
    assert saturate(torch.tensor([torch.nan], dtype=dtype), torch.float16).isnan().all()
    for other in (torch.float32, torch.bfloat16):
        assert torch.equal(saturate(values.clone(), other), values)


def test_infinities_of_a_vision_side_in_float16_are_brought_down_too():
    values = torch.tensor([torch.inf, 1.0, -torch.inf], dtype=torch.float16)
    assert saturate(values, torch.float16).tolist() == [65504.0, 1.0, -65504.0]


def test_a_float16_engine_gets_no_infinities(make_checkpoint, pictures):
    encoder = VisionEncoder.from_pretrained(make_checkpoint(), device='cpu')
    parameters = dict(encoder.tower.named_parameters())
    for bias in ('mlp1.3.bias', 'mlp2.7.bias'):
        parameters[bias][:2] += torch.tensor([1e6, -1e6])
    tiles = encoder.cut(pictures['coffee'])
    features, groups = encoder.features(tiles), [([0], 0.5)]
    [wide] = encoder.visual_tokens(features, [len(tiles)], groups)
    [half] = encoder.visual_tokens(features, [len(tiles)], groups, torch.float16)
    assert wide.embeddings[:, 0].min() > 65504 and wide.embeddings[:, 1].max() < -65504
    assert (half.embeddings[:, 0] == 65504).all() and (half.embeddings[:, 1] == -65504).all()
    assert torch.equal(half.embeddings[:, 2:], wide.embeddings[:, 2:].half())
    assert {64, 256} == set(half.tile_tokens)
