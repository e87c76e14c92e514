"""TileEncoder: the contract, and that a tile's result depends on its pixels alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy_vico.config import UnsupportedCheckpointError, VicoConfig
from lmdeploy_vico.vision.tile_encoder import TileEncoder, default_dtype, default_tile_batch
from lmdeploy_vico.vision.tiling import Tiling, cut_grid


@pytest.fixture(scope='module', params=['layer_norm', 'rms_norm'])
def encoder(request, make_checkpoint):
    return TileEncoder.from_pretrained(make_checkpoint(vit=request.param))


def tiles_of(image, encoder):
    return cut_grid(image, Tiling.of(encoder.config).grid(image.size))


def random_tiles(rng, count):
    return rng.integers(0, 256, (count, 448, 448, 3), dtype=np.uint8)


def test_computes_in_float32_on_a_cpu(make_checkpoint):
    encoder = TileEncoder.from_pretrained(make_checkpoint(), device='cpu', dtype=torch.bfloat16)
    assert encoder.dtype == torch.float32 and encoder.device.type == 'cpu'


def test_groups_are_routed_by_themselves(encoder, pictures):
    tiles = [tiles_of(pictures[name], encoder) for name in ('coffee', 'page', 'chelsea')]
    together = encoder.encode_tiles([tiles[0], tiles[2]])
    counts = [len(image) for image in tiles]
    mixed = encoder.visual_tokens(encoder.features(np.concatenate(tiles)), counts, [([0, 2], 'auto'), ([1], 'all')])
    assert [mixed[0].tile_tokens, mixed[2].tile_tokens] == [result.tile_tokens for result in together]
    assert torch.equal(mixed[0].embeddings, together[0].embeddings)
    assert set(mixed[1].tile_tokens) == {64}


def test_embeddings_in_another_dtype(encoder, pictures):
    tiles = tiles_of(pictures['astronaut'], encoder)
    [expected] = encoder.encode_tiles([tiles])
    features = encoder.features(tiles)
    [rounded] = encoder.visual_tokens(features, [len(expected.tile_tokens)], [([0], 'auto')], torch.bfloat16)
    assert torch.equal(rounded.embeddings, expected.embeddings.to(torch.bfloat16))


def test_wrong_tiles(encoder):
    with pytest.raises(ValueError, match='tiles: expected uint8'):
        encoder.features(np.zeros((1, 448, 448, 3), dtype=np.float32))


@pytest.mark.parametrize('tile_batch', [1, 3, 4])
def test_bit_identical_alone_or_among_others(make_checkpoint, rng, tile_batch):
    encoder = TileEncoder.from_pretrained(make_checkpoint(), tile_batch=tile_batch)
    tiles = random_tiles(rng, 7)
    alone = [encoder.features(tile[None]) for tile in tiles]
    for _ in range(3):
        order = rng.permutation(len(tiles))
        features = encoder.features(tiles[order])
        for place, index in enumerate(order):
            assert torch.equal(features.patches[place], alone[index].patches[0])
            assert torch.equal(features.scores[place], alone[index].scores[0])
        mask = torch.from_numpy(rng.integers(0, 2, len(tiles)).astype(bool))
        for place, tokens in enumerate(encoder.projection.by_tile(features.patches, mask)):
            [expected] = encoder.projection.by_tile(alone[order[place]].patches, mask[place : place + 1])
            assert torch.equal(tokens, expected)


@pytest.mark.slow
def test_bit_identical_in_two_hundred_random_batches(make_checkpoint, rng):
    encoder = TileEncoder.from_pretrained(make_checkpoint(), tile_batch=4)
    tiles = random_tiles(rng, 12)
    tiles[6:] = tiles[:6] ^ 1  # scores as close as can be
    alone = [encoder.start([tile]).wait() for tile in tiles]
    for _ in range(200):
        chosen = rng.choice(len(tiles), rng.integers(1, 5))
        features = encoder.start(list(tiles[chosen])).wait()
        for place, index in enumerate(chosen):
            assert torch.equal(features.patches[place], alone[index].patches[0])
            assert torch.equal(features.scores[place], alone[index].scores[0])


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
        TileEncoder.from_pretrained(path)
    message = str(caught.value)
    assert 'missing tensors: gating.block3.0.bias, mlp2.4.weight' in message
    assert 'mlp1.1.bias is [3], expected' in message


def test_tensors_that_inference_does_not_use_are_not_required(make_checkpoint, tmp_path):
    def change(tensors):
        for name in list(tensors):
            if '.attn3.' in name or '.norm4.' in name:
                del tensors[name]

    TileEncoder.from_pretrained(damaged(make_checkpoint(), tmp_path, change))


def test_missing_shard(make_checkpoint, tmp_path):
    path = shutil.copytree(make_checkpoint(), tmp_path / 'copy')
    shard = sorted(path.glob('*.safetensors'))[0]
    shard.unlink()
    with pytest.raises(UnsupportedCheckpointError, match=shard.name):
        TileEncoder.from_pretrained(path)


def test_no_weights(make_checkpoint, tmp_path):
    shutil.copy(make_checkpoint() / 'config.json', tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match=r'neither model\.safetensors\.index\.json nor'):
        TileEncoder.from_pretrained(tmp_path)


def test_not_a_vico_checkpoint(make_checkpoint):
    with pytest.raises(UnsupportedCheckpointError, match='not a ViCO'):
        TileEncoder.from_pretrained(make_checkpoint(flash=False))


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
