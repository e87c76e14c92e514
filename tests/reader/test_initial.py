"""What training begins with: heads that look where they should, filters that are waves, attention to what is alike."""

import pytest
import torch

from lmdeploy_vico.config import GRID, InternViTConfig
from lmdeploy_vico.reader.initial import (
    HEAD,
    OFFSETS,
    begin_language,
    begin_vision,
    cosine_filters,
    positions,
    shift,
)
from lmdeploy_vico.training.model.vico_model import VicoModel
from lmdeploy_vico.vision.model.intern_vit import InternVisionModel


def vit():
    torch.manual_seed(0)
    model = InternVisionModel(InternViTConfig(64, 4, 2, 192, 'layer_norm', False, True, 1e-6))
    begin_vision(model)
    return model


@pytest.mark.parametrize('offset', [(0, -1), (0, 4), (-1, 0), (2, -3)])
def test_a_shift_takes_a_position_to_another(offset):
    grid = positions().view(GRID, GRID, HEAD)
    row, column = 10, 12
    moved = shift(*offset) @ grid[row, column]
    assert torch.allclose(moved, grid[row + offset[0], column + offset[1]], atol=1e-5)


def test_heads_look_where_their_offsets_say():
    """By positions alone: of all patches, a head's keys fit its query best at the offset."""
    model = vit()
    grid = positions()
    middle = 16 * GRID + 16
    for layer, heads in zip(model.encoder.layers, OFFSETS, strict=True):
        query, key, _ = layer.attn.qkv.weight.detach().chunk(3)
        for number, offsets in enumerate(heads):
            rows = slice(number * HEAD, (number + 1) * HEAD)
            wanted = {(16 + down) * GRID + 16 + right for down, right in offsets}
            scores = (grid @ key[rows, :HEAD].T) @ (query[rows, :HEAD] @ grid[middle])
            assert set(scores.topk(len(wanted)).indices.tolist()) == wanted


def test_filters_are_of_all_waves_and_of_colours():
    filters = cosine_filters()
    assert filters.shape == (64, 3, 14, 14)
    flat = filters.flatten(1) / filters.flatten(1).norm(dim=1, keepdim=True)
    products = flat @ flat.T - torch.eye(64)
    grey = products[:60, :60]
    assert grey.abs().max() < 1e-5  # waves that are orthogonal to each other
    flat_colour = filters[60:].sum((2, 3))
    assert (flat_colour.abs().max(1).values > 0).any()


def test_the_same_seed_gives_the_same_weights():
    first, again = vit(), vit()
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), again.parameters(), strict=True))


def test_attention_is_to_what_is_alike(reader_config):
    torch.manual_seed(1)
    model = VicoModel(reader_config).float()
    begin_language(model.language_model, model.mlp1, model.mlp2)
    attention = model.language_model.model.layers[0].self_attn
    tokens = torch.randn(50, 128)
    queries = (tokens @ attention.q_proj.weight.T).view(50, 4, 32)
    keys = (tokens @ attention.k_proj.weight.T).view(50, 2, 32)
    for head in range(4):
        scores = queries[:, head] @ keys[:, head // 2].T
        assert torch.equal(scores.argmax(1), torch.arange(50))
    assert torch.equal(model.language_model.lm_head.weight, model.language_model.model.embed_tokens.weight)
