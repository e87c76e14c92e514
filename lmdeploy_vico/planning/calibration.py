"""The paper's Table 4 by this model: what is fitted to its rows with 64 text tokens, and how far off all rows are.

The table says how many times faster a language model answers at 25, 50 and 75 % compression: 24 ratios, ten tiles and
64 or 512 text tokens, for the 8B, 30B and 38B on one H200 and the 241B on eight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmdeploy_vico.bench.report.paper import SHARES, SPEEDUPS, TILES
from lmdeploy_vico.checkpoints.flops import causal_attention_flops
from lmdeploy_vico.checkpoints.random.configuration import SIZES
from lmdeploy_vico.checkpoints.sizes import Size
from lmdeploy_vico.planning.constants import (
    CPU_REQUEST_SECONDS,
    CPU_REQUESTS_PER_SECOND,
    CPU_ROUNDS,
    FITTED,
    MAX_PREFILL_TOKENS,
    Fitted,
)
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


def worst(of: Sequence[Ratio]) -> float:
    """Return the largest error of some ratios, without its sign."""
    return max(abs(ratio.error) for ratio in of)


@dataclass(frozen=True)
class CpuRatio:
    """The one ratio that was measured: a language model alone on a CPU, at 75 % compression over none.

    Attributes:
        measured: the ratio.
        lowest, highest: what the slowest and fastest rounds of both cells would make of it.
        ours: by FLOP and :data:`~lmdeploy_vico.planning.constants.CPU_REQUEST_SECONDS`; the CPU's FLOP/s are those of
            the cell without compression.
        flops: by FLOP alone.
    """

    measured: float
    lowest: float
    highest: float
    ours: float
    flops: float

    @property
    def error(self) -> float:
        """How much too large ours is, as a share of what was measured."""
        return self.ours / self.measured - 1


def cpu_ratio() -> CpuRatio:
    """Compare with the language model alone in ``benchmarks/results/first-token-cpu.json``."""
    rates, rounds, besides = CPU_REQUESTS_PER_SECOND, CPU_ROUNDS, CPU_REQUEST_SECONDS
    size, most = SIZES['tiny'], max(rates)
    flops = [_tiny_flops(size, Workload(TILES, FITTED_ROWS, share, images=False).tokens) for share in (0.0, most)]
    prefill = 1 / rates[0.0] - besides
    return CpuRatio(
        measured=rates[most] / rates[0.0],
        lowest=rounds[0.0][0] / rounds[most][1],
        highest=rounds[0.0][1] / rounds[most][0],
        ours=1 / rates[0.0] / (prefill * flops[1] / flops[0] + besides),
        flops=flops[0] / flops[1],
    )


def _tiny_flops(size: Size, tokens: float) -> float:
    """Return the FLOP of a dense model's layers, and of its attention."""
    width = size.heads * size.head_dim
    weights = size.hidden * (2 * width + 2 * size.kv_heads * size.head_dim + 3 * size.mlp)
    return 2 * weights * size.layers * tokens + causal_attention_flops(tokens, width, size.layers)
