"""What was measured of each cell, and the JSON of it, in the names of LMDeploy's and SGLang's own benchmarks."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.client import Round
from lmdeploy_vico.bench.report.breakdown import Breakdown
from lmdeploy_vico.bench.workload.requests import LABELS, Cell, visual_tokens

KV_BLOCK = 64  # tokens of a KV block, LMDeploy's default


class CellResult:
    """The rounds of one cell, added up.

    Args:
        tiles: tiles of a request.
        overhead: tokens of a prompt that are neither visual nor its text.
    """

    def __init__(self, cell: Cell, tiles: int) -> None:
        self.cell = cell
        self.overhead = 0
        self.error: str | None = None  # why the cell could not be measured to its end
        self.duration = 0.0
        self.rounds: list[float] = []
        self.failures: Counter[str] = Counter()
        self.ttft: list[float] = []
        self.cached_tokens = 0
        self.added: dict[str, float] = {}
        self.processor_seconds: dict[str, float] = {}
        self.prefill_steps_per_request: float | None = None  # several requests share a step; None if not counted
        self._tiles = tiles
        self._input_tokens = self._vision_tokens = self._kv_blocks = 0

    def add(self, measured: Round, added: Mapping[str, float], used: Mapping[str, float]) -> None:
        """Add a round, what it added to the server's metrics, and the processor time of the server's processes."""
        self.duration += measured.duration
        self.rounds.append(measured.duration)
        self.add_failures(measured)
        for outcome in measured.outcomes:
            if outcome.error:
                continue
            self.ttft.append(outcome.ttft)
            self.cached_tokens += outcome.cached_tokens
            self._input_tokens += outcome.prompt_tokens
            # LMDeploy without the plugin says no visual tokens, and schedules 256 for every tile.
            known = outcome.image_tokens is not None and self.cell.is_ours
            self._vision_tokens += (outcome.image_tokens or 0) if known else visual_tokens(self._tiles)
            self._kv_blocks += -(-outcome.prompt_tokens // KV_BLOCK)
        for totals, values in ((self.added, added), (self.processor_seconds, used)):
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value

    def add_failures(self, measured: Round) -> None:
        """Count what failed in a round, and nothing else of it."""
        self.failures.update(outcome.error for outcome in measured.outcomes if outcome.error)

    @property
    def completed(self) -> int:
        """Requests that were answered."""
        return len(self.ttft)

    @property
    def failed(self) -> int:
        """Requests that were not."""
        return self.failures.total()

    @property
    def request_throughput(self) -> float:
        """Answered requests per second; 0 before the first."""
        return self.completed / self.duration if self.duration else 0.0

    @property
    def vision_tokens(self) -> int:
        """Visual tokens of all answered requests."""
        return self._vision_tokens

    @property
    def input_tokens(self) -> int:
        """Prompt tokens of all answered requests."""
        return self._input_tokens

    @property
    def input_throughput(self) -> float:
        """Prompt tokens per second."""
        return self._input_tokens / self.duration if self.duration else 0.0

    @property
    def achieved_compression(self) -> float:
        """The share of the visual tokens that was removed, of 256 a tile."""
        return 1 - self._vision_tokens / (self.completed * visual_tokens(self._tiles)) if self.completed else math.nan

    @property
    def tiles_cached(self) -> float:
        """Tiles that the plugin's cache had already."""
        return self.added.get('vico:embedding_cache_hits_total', 0.0)

    @property
    def cached(self) -> bool:
        """Whether caches took more than a hundredth of the work off the server."""
        return bool(self.cached_tokens) or self.tiles_cached > 0.01 * self._tiles * max(self.completed, 1)

    @property
    def kv_blocks_per_request(self) -> float:
        """KV blocks that a prompt takes, on average."""
        return self._kv_blocks / max(self.completed, 1)

    @property
    def breakdown(self) -> Breakdown | None:
        """Where the time went, if the server says."""
        if not self.completed:
            return None
        return Breakdown.of(self.added, float(np.mean(self.ttft)), self.completed, self.duration)

    def ttft_ms(self, percentile: float | None = None) -> float:
        """Milliseconds to the first token: the mean, or a percentile."""
        if not self.ttft:
            return math.nan
        value = np.mean(self.ttft) if percentile is None else np.percentile(self.ttft, percentile)
        return float(value) * 1e3

    def as_json(self, speedup: float, paper: float | None) -> dict[str, Any]:
        """The cell's entry in the output file."""
        answered = max(self.completed, 1)
        breakdown = self.breakdown
        text = self._input_tokens - self._vision_tokens
        busy = {'vit_busy': breakdown.vit_busy, 'tiling_threads': breakdown.tiling_threads} if breakdown else {}
        return _plain(
            {
                'mode': self.cell.mode,
                'server': self.cell.server,
                'label': LABELS[self.cell.server],
                'text_tokens': self.cell.text_tokens,
                'token_compression': self.cell.compression,
                'achieved_token_compression': self.achieved_compression,
                'speedup': speedup,
                'paper_speedup': paper,
                'duration': self.duration,
                'completed': self.completed,
                'failed': self.failed,
                'request_throughput': self.request_throughput,
                'input_throughput': self.input_throughput,
                'total_input_tokens': self._input_tokens,
                'total_input_text_tokens': text,
                'total_input_vision_tokens': self._vision_tokens,
                'mean_ttft_ms': self.ttft_ms(),
                'median_ttft_ms': self.ttft_ms(50),
                'p90_ttft_ms': self.ttft_ms(90),
                'p99_ttft_ms': self.ttft_ms(99),
                'input_tokens_per_request': self._input_tokens / answered,
                'vision_tokens_per_request': self._vision_tokens / answered,
                'user_text_tokens_per_request': text / answered - self.overhead,
                'kv_blocks_per_request': self.kv_blocks_per_request,
                'prefill_steps_per_request': self.prefill_steps_per_request,
                'cached_tokens': self.cached_tokens,
                'round_durations': self.rounds,
                'processor_seconds_per_request': {k: v / answered for k, v in self.processor_seconds.items()} or None,
                'seconds_per_request': breakdown.parts() if breakdown else None,
                **busy,
                'errors': dict(self.failures),
                'error': self.error,
            }
        )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class OutputFile:
    """The results' file: checked before the run, replaced as a whole, so that it always holds complete JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._draft = path.with_name(f'{path.name}.part')

    def check(self) -> None:
        """Raises :class:`BenchError` if it cannot be written."""
        if self.path.exists() and not self.path.is_file():
            raise BenchError(f'{self.path} is a directory or a device: name a file.')
        try:
            self._draft.write_text('{}\n')
            self._draft.unlink()
        except OSError as error:
            raise BenchError(f'{self.path} cannot be written: {error.strerror}.') from error

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace the file; raises :class:`BenchError` and leaves the old one where that fails."""
        try:
            with self._draft.open('w') as file:
                json.dump(content, file, indent=2)
                file.write('\n')
                file.flush()
                os.fsync(file.fileno())
            self._draft.replace(self.path)
        except OSError as error:
            self._draft.unlink(missing_ok=True)
            kept = ' It holds the results of an earlier round.' if self.path.exists() else ''
            raise BenchError(f'{self.path} cannot be written: {error.strerror}.{kept}') from error
