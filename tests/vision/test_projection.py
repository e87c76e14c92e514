"""Projection: which branches run, in batches of which shapes, and what float16 cannot hold."""

import numpy as np
import pytest
import torch

from lmdeploy_vico.vision.projection import saturate
from lmdeploy_vico.vision.tile_encoder import TileEncoder
from lmdeploy_vico.vision.tiling import cut_tiles


@pytest.fixture
def tiles(pictures):
    return cut_tiles(pictures['coffee'], 1, 12)


def test_only_the_routed_branch_is_computed(make_checkpoint, tiles, monkeypatch):
    encoder = TileEncoder.from_pretrained(make_checkpoint())
    calls = []
    project = encoder.tower.project

    def record(patches, compressed):
        calls.append(compressed)
        return project(patches, compressed)

    monkeypatch.setattr(encoder.tower, 'project', record)
    [result] = encoder.encode_tiles([tiles])
    assert calls.count(True) == result.tile_tokens.count(64)
    assert calls.count(False) == result.tile_tokens.count(256)


@pytest.mark.parametrize('tile_batch, rooms', [(1, 9), (4, 17)])
def test_warming_up_projects_every_division_into_batches(make_checkpoint, monkeypatch, tile_batch, rooms):
    encoder = TileEncoder.from_pretrained(make_checkpoint(), tile_batch=tile_batch)
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
        encoder.projection.by_tile([patches] * tiles, torch.arange(tiles) >= full)
    assert seen == warmed and len(seen) == rooms


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


def test_a_float16_engine_gets_no_infinities(make_checkpoint, tiles):
    encoder = TileEncoder.from_pretrained(make_checkpoint(), device='cpu')
    parameters = dict(encoder.tower.named_parameters())
    for bias in ('mlp1.3.bias', 'mlp2.7.bias'):
        parameters[bias][:2] += torch.tensor([1e6, -1e6])
    features, groups = encoder.features(tiles), [([0], 0.5)]
    [wide] = encoder.visual_tokens(features, [len(tiles)], groups)
    [half] = encoder.visual_tokens(features, [len(tiles)], groups, torch.float16)
    assert wide.embeddings[:, 0].min() > 65504 and wide.embeddings[:, 1].max() < -65504
    assert (half.embeddings[:, 0] == 65504).all() and (half.embeddings[:, 1] == -65504).all()
    assert torch.equal(half.embeddings[:, 2:], wide.embeddings[:, 2:].half())
    assert {64, 256} == set(half.tile_tokens)
