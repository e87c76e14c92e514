"""The routing rule: which tiles of a prompt are compressed to 64 visual tokens."""

import hashlib
import itertools
from collections.abc import Sequence
from decimal import ROUND_FLOOR, ROUND_HALF_UP, Decimal
from typing import Any, TypeAlias

import torch

from lmdeploy_vico.choices import Compression, Experiment, Pressed
from lmdeploy_vico.config import TOKENS_FULL
from lmdeploy_vico.vision.tiling import Grid

# Images of a prompt, by their indices, that are routed together, and what they are routed by.
RoutingGroup: TypeAlias = tuple[Sequence[int], Compression]

SEED = b'random'


def route(
    scores: torch.Tensor,
    compression: Compression,
    relative_threshold: float,
    absolute_threshold: float,
    digests: Sequence[bytes] = (),
) -> torch.Tensor:
    """Decide for the tiles of one prompt; the quantile must never see another prompt's tiles.

    ``auto`` compresses tile i when ``s_i > quantile(s, relative_threshold)`` (linear interpolation, strict) and
    ``s_i >= absolute_threshold``. A fraction f compresses the round-half-up(f * n) tiles with the highest scores, ties
    going to the lower index. ``random:f`` compresses as many, those that :func:`_drawn` puts first. Under pressure,
    :class:`Pressed` compresses further tiles in the same order, at most its share of n.

    Args:
        scores: p[0] of each tile, float32 ``[n]``: the probability that compression loses nothing (paper, Eq. 4).
        digests: of each tile's pixels; needed for ``random``.

    Returns:
        bool ``[n]`` on the scores' device, true where the tile gets 64 tokens.
    """
    if isinstance(compression, Pressed):
        chosen = route(scores, compression.base, relative_threshold, absolute_threshold, digests)
        order = torch.argsort(scores, descending=True, stable=True)
        spared = order[~chosen[order]]
        chosen[spared[: round_down(compression.extra, scores.numel())]] = True
        return chosen
    if compression == 'none' or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if compression == 'all':
        return torch.ones_like(scores, dtype=torch.bool)
    if compression == 'auto':
        quantile = torch.quantile(scores.float(), relative_threshold)
        return (scores > quantile) & (scores >= absolute_threshold)
    if isinstance(compression, Experiment):
        if compression.kind == 'image':
            return (scores.mean() >= compression.value).expand(scores.shape)
        order, fraction = _drawn(digests), compression.value
    else:
        order, fraction = torch.argsort(scores, descending=True, stable=True), float(compression)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[order[: round_half_up(fraction, scores.numel())]] = True
    return chosen


def route_prompt(
    scores: torch.Tensor,
    digests: Sequence[bytes],
    counts: Sequence[int],
    groups: Sequence[RoutingGroup],
    relative_threshold: float,
    absolute_threshold: float,
) -> torch.Tensor:
    """Decide for the tiles of one prompt, each group of images by itself; see :func:`route`.

    Args:
        scores: of all tiles, image after image.
        digests: of all tiles' pixels.
        counts: tiles of each image.
        groups: each image stands in one of them.

    Returns:
        bool ``[sum(counts)]``, true where the tile gets 64 tokens.
    """
    compressed = torch.zeros(scores.shape, dtype=torch.bool)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for images, compression in groups:
        whole = isinstance(compression, Experiment) and compression.kind == 'image'
        for together in [[image] for image in images] if whole else [list(images)]:
            chosen = torch.isin(owner, torch.tensor(together, dtype=owner.dtype))
            of_these = list(itertools.compress(digests, chosen.tolist())) if isinstance(compression, Experiment) else ()
            compressed[chosen] = route(scores[chosen], compression, relative_threshold, absolute_threshold, of_these)
    return compressed


def as_json(grid: Grid, scores: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """What became of an image, as commands and servers say it.

    Args:
        grid: of its tiles.
        scores: of each tile, row by row, the thumbnail's last.
        tokens: visual tokens of each tile.
    """
    tiles = [{'score': round(score, 6), 'tokens': count} for score, count in zip(scores, tokens, strict=True)]
    return {
        'grid': [grid.columns, grid.rows],
        'tiles': tiles,
        'tokens': sum(tokens),
        'tokens_full': TOKENS_FULL * len(tokens),
    }


def _drawn(digests: Sequence[bytes]) -> torch.Tensor:
    """The indices of tiles in an order that depends on nothing but their pixels: by SHA-256 of a seed and their digest.

    Tiles with the same pixels keep their order.
    """
    drawn = [hashlib.sha256(SEED + digest).digest() for digest in digests]
    return torch.tensor(sorted(range(len(drawn)), key=drawn.__getitem__), dtype=torch.long)


def round_half_up(fraction: float, tiles: int) -> int:
    """How many of so many tiles a fraction is."""
    return _rounded(fraction, tiles, ROUND_HALF_UP)


def round_down(fraction: float, tiles: int) -> int:
    """The most of so many tiles that are no more than a fraction."""
    return _rounded(fraction, tiles, ROUND_FLOOR)


def _rounded(fraction: float, tiles: int, rounding: str) -> int:
    # In decimal: 0.29 * 50 is 14.499999999999998 in binary floating point, and would round down.
    return int((Decimal(repr(fraction)) * tiles).quantize(Decimal(1), rounding=rounding))
