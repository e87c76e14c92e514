"""Batches: samples laid out with some of their tiles compressed."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.training.data.samples import Sample
from lmdeploy_vico.vision.tiling import TILE_SHAPE


@dataclass(frozen=True)
class Batch:
    """Laid out samples, padded at the end to one length L.

    Padding needs no mask: attention is causal, so nothing that counts sees it.

    Attributes:
        ids: int64 ``[B, L]``; 0 at visual tokens and padding.
        visual: bool ``[B, L]``, where visual tokens stand.
        predicts: bool ``[B, L]``, the positions whose next token belongs to a response.
        tiles: uint8 ``[T, 448, 448, 3]``, of one sample after another.
        compressed: bool ``[T]``, which of them have 64 visual tokens.
        responses: int64 ``[B]``, tokens of each sample's responses.
    """

    ids: torch.Tensor
    visual: torch.Tensor
    predicts: torch.Tensor
    tiles: torch.Tensor
    compressed: torch.Tensor
    responses: torch.Tensor

    def to(self, device: torch.device) -> 'Batch':
        """The same on a device."""
        moved: dict[str, Any] = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return Batch(**moved)


def lay_out(samples: Sequence[Sample], compressed: Sequence[np.ndarray]) -> Batch:
    """Lay out samples.

    Args:
        samples: at least one.
        compressed: bool for each tile of each sample.
    """
    rows = [_row(sample, chosen) for sample, chosen in zip(samples, compressed, strict=True)]
    length = max(len(ids) for ids, _, _ in rows)
    ids = np.zeros((len(rows), length), np.int64)
    visual, response = np.zeros_like(ids, dtype=bool), np.zeros((len(rows), length + 1), dtype=bool)
    for i, (row_ids, row_visual, row_response) in enumerate(rows):
        ids[i, : len(row_ids)], visual[i, : len(row_ids)] = row_ids, row_visual
        response[i, : len(row_ids)] = row_response
    predicts = response[:, 1:]
    return Batch(
        ids=torch.from_numpy(ids),
        visual=torch.from_numpy(visual),
        predicts=torch.from_numpy(predicts),
        tiles=torch.from_numpy(np.concatenate([sample.tiles for sample in samples]).reshape(-1, *TILE_SHAPE)),
        compressed=torch.from_numpy(np.concatenate([*compressed]).astype(bool)),
        responses=torch.from_numpy(predicts.sum(1)),
    )


def _row(sample: Sample, compressed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, which of them are visual tokens, and which belong to a response."""
    tokens = np.where(compressed, TOKENS_COMPRESSED, TOKENS_FULL)
    images = iter(np.split(tokens, np.cumsum(sample.counts)[:-1]) if sample.counts else [])
    ids, visual, response = [], [], []
    for span in sample.spans:
        count = int(next(images).sum()) if span.image else 0
        ids += [*span.ids, *[0] * count]
        visual += [*[False] * len(span.ids), *[True] * count]
        response += [*[span.response] * len(span.ids), *[False] * count]
    return np.array(ids), np.array(visual, dtype=bool), np.array(response, dtype=bool)
