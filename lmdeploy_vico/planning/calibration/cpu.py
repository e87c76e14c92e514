"""The language model alone on a CPU: what the form of the model says of ratios that were measured there.

Three runs of ``lmdeploy-vico bench --mode llm`` with a tiny model give processor time and requests/s of eight kinds of
prompts. As for the paper's Table 4, what has no source is fitted to the rows with 64 text tokens: FLOP/s of products
and of attention, and for requests/s a time for each request. A CPU does not reach the same share of its peak in
products and in attention, nor does a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from lmdeploy_vico.bench.report.paper import SHARES, TILES
from lmdeploy_vico.checkpoints.flops import causal_attention_flops
from lmdeploy_vico.checkpoints.random.configuration import SIZES
from lmdeploy_vico.planning.constants import CPU_REQUESTS_PER_SECOND, CPU_SECONDS, CpuRun
from lmdeploy_vico.planning.deployment import Workload

SIZE = SIZES['tiny']  # of the checkpoint, whose language model is dense
FITTED_ROW, OTHER_ROW = 64, 512  # text tokens
KINDS = [(text, share) for text in (FITTED_ROW, OTHER_ROW) for share in (0.0, *SHARES)]


@dataclass(frozen=True)
class CpuRates:
    """FLOP/s of one core in products, with all else that grows with the tokens, and in attention.

    ``request`` is the seconds that each request takes besides, in other processes.
    """

    products: float
    attention: float
    request: float = 0.0

    def seconds(self, text_tokens: int, compression: float) -> float:
        """Return the seconds of a prompt of ten tiles."""
        products, attention = flops(text_tokens, compression)
        return products / self.products + attention / self.attention + self.request


def flops(text_tokens: int, compression: float) -> tuple[float, float]:
    """Return the FLOP of products and of attention in the layers, for a prompt of ten tiles."""
    tokens = Workload(TILES, text_tokens, compression, images=False).tokens
    width = SIZE.heads * SIZE.head_dim
    weights = SIZE.hidden * (2 * width + 2 * SIZE.kv_heads * SIZE.head_dim + 3 * SIZE.mlp)
    return 2 * weights * SIZE.layers * tokens, causal_attention_flops(tokens, width, SIZE.layers)


def fit_rates() -> CpuRates:
    """Fit both rates to the engine's processor time in the cells with 64 text tokens: least relative squares."""
    products, attention = _fit(CPU_SECONDS, flops)
    return CpuRates(1 / products, 1 / attention)


def fit_request_rates() -> CpuRates:
    """Fit both rates, and a time for each request, to requests/s in the same cells."""
    runs = [{kind: 1 / rate for kind, rate in run.items()} for run in CPU_REQUESTS_PER_SECOND]
    products, attention, request = _fit(runs, lambda *kind: (*flops(*kind), 1.0))
    return CpuRates(1 / products, 1 / attention, request)


def _fit(runs: Sequence[CpuRun], parts: Callable[[int, float], tuple[float, ...]]) -> list[float]:
    """Seconds of one of each part."""
    kinds = [kind for kind in KINDS if kind[0] == FITTED_ROW]
    measured = np.array([mean(run[kind] for run in runs) for kind in kinds])
    counted = np.array([parts(*kind) for kind in kinds]) / measured[:, None]
    return [float(seconds) for seconds in np.linalg.lstsq(counted, np.ones(len(kinds)), rcond=None)[0]]


@dataclass(frozen=True)
class CpuRatio:
    """How many times as fast as without compression the language model was on a CPU.

    Attributes:
        text_tokens, compression: of the prompts.
        processor: by the processor time of the engine, in each run.
        requests: by requests/s, in each run.
        ours: by the rates that are fitted to processor time.
        ours_by_requests: by those that are fitted to requests/s.
        flops: by FLOP alone, as if both rates were one.
    """

    text_tokens: int
    compression: float
    processor: tuple[float, ...]
    requests: tuple[float, ...]
    ours: float
    ours_by_requests: float
    flops: float

    @property
    def error(self) -> float:
        """How much too large ours is, as a share of the runs' mean by processor time."""
        return self.ours / mean(self.processor) - 1


def cpu_ratios() -> list[CpuRatio]:
    """Return the six ratios of both rows."""
    rates, request_rates = fit_rates(), fit_request_rates()
    return [
        CpuRatio(
            text,
            share,
            processor=_ratios(CPU_SECONDS, text, share),
            requests=tuple(1 / ratio for ratio in _ratios(CPU_REQUESTS_PER_SECOND, text, share)),
            ours=rates.seconds(text, 0.0) / rates.seconds(text, share),
            ours_by_requests=request_rates.seconds(text, 0.0) / request_rates.seconds(text, share),
            flops=sum(flops(text, 0.0)) / sum(flops(text, share)),
        )
        for text, share in KINDS
        if share
    ]


def _ratios(runs: Sequence[CpuRun], text: int, share: float) -> tuple[float, ...]:
    return tuple(run[text, 0.0] / run[text, share] for run in runs)
