"""Weights that the reader's training begins with.

From random weights, a model of this size does not find out in minutes that text is read from left to right. Here every
head of the ViT looks a fixed number of patches away from the first step on, patches are described by their cosine
transform, and the language model attends to what is alike and copies it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmdeploy_vico.config import GRID, PATCH_SIZE
from lmdeploy_vico.vision.model.intern_vit import InternVisionModel

Offset = tuple[int, int]  # rows and columns of patches

FREQUENCIES = 8  # of a coordinate, each with a sine and a cosine
HEAD = 4 * FREQUENCIES  # channels of a head, and of the position of a patch: 16 for the row, 16 for the column
AMPLITUDE = 1.2  # of positions
SHARPNESS = 2.0  # of a head that looks an offset away
# Where each head of each layer looks at first: the neighbours of strokes, then characters of the same entry.
OFFSETS: Sequence[Sequence[Sequence[Offset]]] = (
    (((0, -1),), ((0, 1),)),
    (((-1, 0), (1, 0)), ((0, -2),)),
    (((0, -2),), ((0, -4),)),
    (((0, -3),), ((0, -4), (0, -6))),
)
GREY, RED_GREEN, BLUE_YELLOW = (0.5, 0.6, 0.4), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0)
LOW, HIGH, WAVES = 28, 32, 9  # cosines of grey patches, and how many waves they have at most in a direction
Q_NORM = 1.5  # so that the language model's attention is sharp enough to find one of hundreds of tokens


@torch.no_grad()
def begin_vision(vision: InternVisionModel) -> None:
    """Fill a ViT of :data:`lmdeploy_vico.reader.design.SIZE` from torch's random numbers."""
    _fill_randomly(vision)
    embeddings = vision.embeddings
    embeddings.class_embedding.normal_(std=0.1)
    embeddings.position_embedding.zero_()
    embeddings.position_embedding[0, 1:, :HEAD] = AMPLITUDE * positions()
    embeddings.patch_embedding.weight.copy_(cosine_filters())
    layers: Any = vision.encoder.layers
    for layer, heads in zip(layers, OFFSETS, strict=True):
        query, key, _ = layer.attn.qkv.weight.chunk(3)
        for number, offsets in enumerate(heads):
            rows = slice(number * HEAD, (number + 1) * HEAD)
            query[rows] *= 0.2
            key[rows] *= 0.2
            key[rows, :HEAD] += SHARPNESS * torch.eye(HEAD)
            query[rows, :HEAD] += SHARPNESS * sum(shift(*offset) for offset in offsets)


def _fill_randomly(module: nn.Module) -> None:
    """Matrices get a variance of 1 / fan-in, or a quarter of that before a residual; norms and scales 1, biases 0."""
    for name, value in module.named_parameters():
        if value.dim() == 2:
            adds = name.endswith(('attn.proj.weight', 'fc2.weight', 'o_proj.weight', 'down_proj.weight'))
            value.normal_(std=value.shape[1] ** -0.5 * (0.5 if adds else 1))
        elif name.endswith('bias'):
            value.zero_()
        else:
            value.fill_(1)


def _angles() -> Tensor:
    return math.pi * (torch.arange(FREQUENCIES) + 0.5) / FREQUENCIES


def positions() -> Tensor:
    """Sines and cosines of every patch's row and column, ``[1024, 32]``."""
    angles = torch.arange(GRID)[:, None] * _angles()
    waves = torch.stack([angles.cos(), angles.sin()], 2).flatten(1)
    rows, columns = waves[:, None].expand(GRID, GRID, -1), waves[None].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


def shift(down: int, right: int) -> Tensor:
    """The matrix ``[32, 32]`` that takes a patch's position to that of the patch so far away."""
    blocks = []
    for distance in (down, right):
        for angle in _angles().tolist():
            cosine, sine = math.cos(angle * distance), math.sin(angle * distance)
            blocks.append(torch.tensor([[cosine, -sine], [sine, cosine]]))
    return torch.block_diag(*blocks)


def cosine_filters() -> Tensor:
    """Filters of 14 x 14 pixels, ``[64, 3, 14, 14]``: cosine transforms of grey, fine ones first, and of colours."""
    pixel = torch.arange(float(PATCH_SIZE))
    waves = torch.cos(math.pi / PATCH_SIZE * (pixel + 0.5) * pixel[:, None])
    waves /= waves.norm(dim=1, keepdim=True)
    order = sorted(((u, v) for u in range(WAVES) for v in range(WAVES)), key=lambda pair: pair[0] ** 2 + pair[1] ** 2)

    def filtered(colour: Sequence[float], pair: tuple[int, int], gain: float) -> Tensor:
        return torch.tensor(colour)[:, None, None] * torch.outer(waves[pair[0]], waves[pair[1]]) * gain

    high = [filtered(GREY, pair, 0.2) for pair in order[LOW : LOW + HIGH]]
    low = [filtered(GREY, pair, 0.3 if any(pair) else 0.07) for pair in order[:LOW]]
    colours = [filtered(colour, pair, 0.1) for colour in (RED_GREEN, BLUE_YELLOW) for pair in order[:2]]
    return torch.stack([*high, *low, *colours])


@torch.no_grad()
def begin_language(language: Any, *projectors: nn.Sequential) -> None:
    """Fill a Qwen3 of ``transformers`` and the projectors of its visual tokens from torch's random numbers.

    Queries are made as keys are, and the output of attention undoes its values, so that a token attends to its like and
    takes on what is there.
    """
    _fill_randomly(language)
    for projector in projectors:
        _fill_randomly(projector)
        nn.init.normal_(_last(projector).weight, std=0.02)
    model = language.model
    model.embed_tokens.weight.normal_(std=0.05)
    language.lm_head.weight.copy_(model.embed_tokens.weight)
    for layer in model.layers:
        attention = layer.self_attn
        size = attention.head_dim
        groups = attention.q_proj.weight.shape[0] // attention.k_proj.weight.shape[0]
        attention.q_norm.weight.fill_(Q_NORM)
        keys, values = attention.k_proj.weight.split(size), attention.v_proj.weight.split(size)
        attention.q_proj.weight.copy_(torch.cat([key for key in keys for _ in range(groups)]))
        attention.o_proj.weight.copy_(0.5 * torch.cat([value.T for value in values for _ in range(groups)], 1))


def _last(projector: nn.Sequential) -> nn.Linear:
    layer = projector[-1]
    assert isinstance(layer, nn.Linear)
    return layer
