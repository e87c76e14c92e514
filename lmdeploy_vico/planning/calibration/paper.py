"""The paper's Table 4 by this model: what is fitted to its rows with 64 text tokens, and how far off all rows are.

The table says how many times faster a language model answers at 25, 50 and 75 % compression: 24 ratios, ten tiles and
64 or 512 text tokens, for the 8B, 30B and 38B on one H200 and the 241B on eight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lmdeploy_vico.bench.report.paper import SHARES, SPEEDUPS, TILES
from lmdeploy_vico.planning.constants import FITTED, MAX_PREFILL_TOKENS, Fitted
from lmdeploy_vico.planning.deployment import Workload
from lmdeploy_vico.planning.gpus import GPUS
from lmdeploy_vico.planning.language import LanguageModel

# The paper's names, our names, and over how many GPUs each was split (section 4.6). It trained on H200.
MODELS = {'8B': ('8B', 1), '30B': ('30B-A3B', 1), '38B': ('38B', 1), '241B': ('241B', 8)}
GPU = 'H200'
FITTED_ROWS, OTHER_ROWS = 64, 512  # text tokens
STEPS = 20  # of the fit, far more than it needs


@dataclass(frozen=True)
class Ratio:
    """One ratio of the table.

    Attributes:
        model: the paper's name.
        text_tokens: of the row.
        compression: of the column.
        paper, ours: how many times faster than without compression.
    """

    model: str
    text_tokens: int
    compression: float
    paper: float
    ours: float

    @property
    def error(self) -> float:
        """How much too large ours is, as a share of the paper's."""
        return self.ours / self.paper - 1


def ratios(fitted: Fitted = FITTED, rows: Sequence[int] = (FITTED_ROWS, OTHER_ROWS)) -> list[Ratio]:
    """Return the ratios of the rows with so many text tokens."""
    return [
        Ratio(paper_name, text, share, paper, speedup(LanguageModel(name, GPUS[GPU], tp, fitted), text, share))
        for paper_name, (name, tp) in MODELS.items()
        for text in rows
        for share, paper in zip(SHARES, SPEEDUPS[paper_name][text], strict=True)
    ]


def speedup(
    model: LanguageModel,
    text_tokens: int,
    compression: float,
    tiles: int = TILES,
    limit: int = MAX_PREFILL_TOKENS,
) -> float:
    """Return how many times as many requests/s a language model alone answers as without compression."""
    seconds = [
        model.request_seconds(Workload(tiles, text_tokens, share, images=False).tokens, limit)
        for share in (0.0, compression)
    ]
    return seconds[0] / seconds[1]


def fit(more_for: str = '30B-A3B') -> Fitted:
    """Fit both times of :class:`Fitted` to the rows with 64 text tokens: the least sum of squared relative errors.

    Gauss and Newton's method; it needs a handful of steps, since the errors are nearly linear in both.
    """

    def errors(times: np.ndarray) -> np.ndarray:
        fitted = Fitted(float(times[0]), {more_for: float(times[1])})
        return np.array([ratio.error for ratio in ratios(fitted, [FITTED_ROWS])])

    times, nudge = np.array([1e-4, 1e-4]), 1e-7  # seconds
    for _ in range(STEPS):
        here = errors(times)
        slope = np.stack([(errors(times + step) - here) / nudge for step in nudge * np.eye(2)], axis=1)
        times = times - np.linalg.lstsq(slope, here, rcond=None)[0]
    return Fitted(round(float(times[0]), 6), {more_for: round(float(times[1]), 6)})


class Erring(Protocol):
    """Anything with an error."""

    @property
    def error(self) -> float:
        """A share, with its sign."""


def worst(of: Sequence[Erring]) -> float:
    """Return the largest error of some ratios, without its sign."""
    return max(abs(ratio.error) for ratio in of)
