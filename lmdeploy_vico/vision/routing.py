"""The routing rule: which tiles of a prompt are compressed to 64 visual tokens."""

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import TypeAlias

import torch

from lmdeploy_vico.choices import Compression

# Images of a prompt, by their indices, that are routed together, and what they are routed by.
RoutingGroup: TypeAlias = tuple[Sequence[int], Compression]


def route(
    scores: torch.Tensor,
    compression: Compression,
    relative_threshold: float,
    absolute_threshold: float,
) -> torch.Tensor:
    """Decide for the tiles of one prompt; the quantile must never see another prompt's tiles.

    ``auto`` compresses tile i when ``s_i > quantile(s, relative_threshold)`` (linear interpolation, strict) and
    ``s_i >= absolute_threshold``. A fraction f compresses the round-half-up(f * n) tiles with the highest scores, ties
    going to the lower index.

    Args:
        scores: p[0] of each tile, float32 ``[n]``: the probability that compressing it loses nothing (paper, Eq. 4).

    Returns:
        bool ``[n]`` on the scores' device, true where the tile gets 64 tokens.
    """
    if compression == 'none' or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if compression == 'all':
        return torch.ones_like(scores, dtype=torch.bool)
    if compression == 'auto':
        quantile = torch.quantile(scores.float(), relative_threshold)
        return (scores > quantile) & (scores >= absolute_threshold)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    order = torch.argsort(scores, descending=True, stable=True)
    chosen[order[: _round_half_up(float(compression), scores.numel())]] = True
    return chosen


def route_prompt(
    scores: torch.Tensor,
    counts: Sequence[int],
    groups: Sequence[RoutingGroup],
    relative_threshold: float,
    absolute_threshold: float,
) -> torch.Tensor:
    """Decide for the tiles of one prompt, each group of images by itself; see :func:`route`.

    Args:
        scores: of all tiles, image after image.
        counts: tiles of each image.
        groups: each image stands in one of them.

    Returns:
        bool ``[sum(counts)]``, true where the tile gets 64 tokens.
    """
    compressed = torch.zeros(scores.shape, dtype=torch.bool)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for images, compression in groups:
        chosen = torch.isin(owner, torch.tensor(list(images), dtype=owner.dtype))
        compressed[chosen] = route(scores[chosen], compression, relative_threshold, absolute_threshold)
    return compressed


def _round_half_up(fraction: float, tiles: int) -> int:
    # In decimal: 0.29 * 50 is 14.499999999999998 in binary floating point, and would round down.
    return int((Decimal(repr(fraction)) * tiles).quantize(Decimal(1), rounding=ROUND_HALF_UP))
