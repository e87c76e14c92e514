"""The routing rule: which tiles of a prompt are compressed to 64 visual tokens."""

from decimal import ROUND_HALF_UP, Decimal

import torch

from lmdeploy_vico.choices import Compression


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
        scores: p[0] of each tile, float32 ``[n]``: the probability that hard compression loses nothing (paper, Eq. 4).

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


def _round_half_up(fraction: float, tiles: int) -> int:
    # In decimal: 0.29 * 50 is 14.499999999999998 in binary floating point, and would round down.
    return int((Decimal(repr(fraction)) * tiles).quantize(Decimal(1), rounding=ROUND_HALF_UP))
