"""What a trained router is worth: its agreement with held-out labels, its scores, and how much it compresses."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.training.data.samples import Samples
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.model.vico_model import RouterModel
from lmdeploy_vico.training.stages.labels import COMPRESS
from lmdeploy_vico.vision.routing import route

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
AT_A_TIME = 16  # tiles


@dataclass(frozen=True)
class Thresholds:
    """The two thresholds of the routing rule."""

    relative: float
    absolute: float

    def as_config(self) -> dict[str, float]:
        """As a checkpoint's config has them."""
        return {'flash_relative_threshold': self.relative, 'flash_absolute_threshold': self.absolute}


@torch.no_grad()
def scores_of(model: RouterModel, samples: Samples, processes: Processes) -> list[np.ndarray]:
    """The router's p[0] of all tiles of each sample, computed in every process alike."""
    scores = []
    for index in range(len(samples)):
        tiles = torch.from_numpy(samples[index].tiles).to(processes.device)
        with processes.autocast():
            parts = [model(part).softmax(-1)[:, 0].cpu() for part in tiles.split(AT_A_TIME) if len(part)]
        scores.append(torch.cat(parts).numpy() if parts else np.empty(0, np.float32))
    processes.release(model)
    return scores


def compressed_share(scores: Sequence[np.ndarray], thresholds: Thresholds) -> float:
    """The share of all samples' tiles that a server would compress; each sample is a prompt."""
    chosen = [
        route(torch.from_numpy(each), 'auto', thresholds.relative, thresholds.absolute).numpy() for each in scores
    ]
    together = np.concatenate(chosen)
    return float(together.mean()) if len(together) else 0.0


def fit_threshold(scores: Sequence[np.ndarray], relative: float, share: float) -> Thresholds:
    """The absolute threshold with which the share comes closest to what is wanted.

    It stands half way between two scores, as the last bits of a score are not the same on every device.
    """
    ordered = np.unique(np.concatenate([[0.0], *scores, [1.0]]).astype(np.float64))
    candidates = [Thresholds(relative, float(middle)) for middle in (ordered[1:] + ordered[:-1]) / 2]
    # The higher the threshold, the less is compressed.
    first = bisect_left(candidates, -share, key=lambda each: -compressed_share(scores, each))
    return min(candidates[max(0, first - 1) : first + 1], key=lambda each: abs(compressed_share(scores, each) - share))


@dataclass(frozen=True)
class Verdict:
    """The judgement of held-out samples.

    Attributes:
        own: the scores of the labelled tiles, ``[n]``.
        classes: their labels, ``[n]``.
        scores: of all tiles, by sample.
        thresholds: that a server will use.
    """

    own: np.ndarray
    classes: np.ndarray
    scores: Sequence[np.ndarray]
    thresholds: Thresholds

    def as_json(self) -> dict[str, Any]:
        """The same in numbers."""
        predicted = self.own > 0.5
        share = compressed_share(self.scores, self.thresholds)
        kinds = {'compress': self.classes == COMPRESS, 'keep': self.classes != COMPRESS}
        return {
            'labels': {name: int(chosen.sum()) for name, chosen in kinds.items()},
            'agreement': float(np.mean(predicted == (self.classes == COMPRESS))),
            'scores': {name: _quantiles(self.own[chosen]) for name, chosen in kinds.items()},
            'compressed tiles': share,
            'visual tokens removed': share * (1 - TOKENS_COMPRESSED / TOKENS_FULL),
        }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f'{q:g}': float(np.quantile(values, q)) for q in QUANTILES} if len(values) else {}
