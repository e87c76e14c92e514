"""What the share of a rank took, what all-reduces would add by the planner's model, and what both say together.

Nothing here is measured but ``measured``: ``modelled`` is arithmetic, and ``together`` the sum of both.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.lib.timing import Timing
from benchmarks.share.prefills import Cell
from lmdeploy_vico.bench.report.paper import SHARES, SPEEDUPS, TILES
from lmdeploy_vico.checkpoints.sizes import MODELS, Model
from lmdeploy_vico.planning.gpus import GPUS, Gpu
from lmdeploy_vico.planning.language import LanguageModel, Piece, all_reduce_seconds

NATURE = (
    "measured: prefills of one rank's share with random weights on one device, without the other ranks; "
    'modelled: all-reduces, by lmdeploy-vico plan; together: their sum'
)
OTHERWISE = 'H200'  # GPU of the model where the device is none that the planner knows


@dataclass(frozen=True)
class Split:
    """What was split, and how much of it was measured.

    Attributes:
        like: the whole model's name.
        model: the whole model.
        tp: ranks.
        layers: that were measured. Where they are not all, times are scaled to all of them, as if nothing but layers
            took time: what a step takes beside them is then counted too often.
        gpu: of the all-reduces and the planner's prediction.
    """

    like: str
    model: Model
    tp: int
    layers: int
    gpu: Gpu

    @property
    def scale(self) -> float:
        """The factor from measured times to those of all layers."""
        return self.model.size.layers / self.layers

    def all_reduces(self, tokens: float) -> float:
        """Return the seconds of a step's all-reduces, by the planner's model."""
        return all_reduce_seconds(self.model.size, self.gpu, self.tp, tokens)


def gpu_of_device(name: str) -> Gpu:
    """Return the GPU that a device's name tells of, such as "NVIDIA H100 80GB HBM3"."""
    return next((gpu for key, gpu in GPUS.items() if key.partition('-')[0] in name.upper()), GPUS[OTHERWISE])


def rows(split: Split, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return a row for each cell that has been measured; speed-ups are against no compression and the same text."""
    made = [_row(split, cell) for cell in cells if cell.full]
    for row in made:
        reference = next(one for one in made if one['text_tokens'] == row['text_tokens'])
        for part in ('measured', 'together', 'planned'):
            times = reference[part], row[part]
            row['speedup'][part] = _ratio(*times) if all(times) and reference['token_compression'] == 0 else None
    return made


def _ratio(reference: dict[str, Any], row: dict[str, Any]) -> float:
    return float(reference['request_ms'] / row['request_ms'])


def _row(split: Split, cell: Cell) -> dict[str, Any]:
    alone, full = Timing.of(cell.alone), Timing.of(cell.full)
    alone_ms, full_ms = (1e3 * split.scale * timing.median for timing in (alone, full))
    reduces_alone = 1e3 * split.all_reduces(cell.tokens)
    reduces_full = 1e3 * sum(map(split.all_reduces, cell.steps)) / len(cell.prompts)
    return {
        'text_tokens': cell.work.text_tokens,
        'token_compression': cell.work.compression,
        'prompt_tokens': cell.tokens,
        'prompts_together': len(cell.prompts),
        'step_tokens': cell.steps,
        'measured': _times(alone_ms, full_ms)
        | {'rounds': full.rounds}
        | {f'request_ms_{name}': 1e3 * split.scale * getattr(full, name) for name in ('fastest', 'slowest')},
        'modelled': {'all_reduce_ms_alone': reduces_alone, 'all_reduce_ms_request': reduces_full},
        'together': _times(alone_ms + reduces_alone, full_ms + reduces_full),
        'planned': _planned(split, cell.tokens),
        'speedup': {'paper': _paper(split, cell)},
    }


def _times(alone_ms: float, request_ms: float) -> dict[str, float]:
    """Milliseconds of a prompt alone, and of each where steps are full, with the requests/s that follow."""
    return {'alone_ms': alone_ms, 'request_ms': request_ms, 'requests_per_second': 1e3 / request_ms}


def _planned(split: Split, tokens: float) -> dict[str, float] | None:
    """What ``lmdeploy-vico plan`` says of the whole, all-reduces included; None of a model that it does not know."""
    if split.like not in MODELS:
        return None
    model = LanguageModel(split.like, split.gpu, split.tp)
    alone = model.step_seconds([Piece(0.0, tokens, last=True)])
    return _times(1e3 * alone, 1e3 * model.request_seconds(tokens))


def _paper(split: Split, cell: Cell) -> float | None:
    work, known = cell.work, SPEEDUPS.get(split.like, {})
    if work.tiles != TILES or work.compression not in SHARES or work.text_tokens not in known:
        return None
    return known[work.text_tokens][SHARES.index(work.compression)]


def table(split: Split, made: Sequence[dict[str, Any]]) -> Table:
    """Return all rows for people."""
    layers = f'{split.layers} of {split.model.size.layers} layers'
    title = f'{split.like}, share of one of {split.tp} ranks, {layers}: milliseconds of a request where steps are full'
    shown = Table('text', 'removed', 'tokens', 'alone', 'measured', '+ all-reduces', '= together', 'plan', title=title)
    for name in ('speed-up', 'together', 'plan', 'paper'):
        shown.add_column(name, justify='right')
    for row in made:
        reduces = row['modelled']['all_reduce_ms_request']
        planned = row['planned'] or {}
        times = (row['measured']['alone_ms'], row['measured']['request_ms'], reduces, row['together']['request_ms'])
        ratios = (row['speedup'][name] for name in ('measured', 'together', 'planned', 'paper'))
        shown.add_row(
            str(row['text_tokens']),
            f'{row["token_compression"]:.0%}',
            f'{row["prompt_tokens"]:.0f}',
            *(_number(time) for time in (*times, planned.get('request_ms'))),
            *(_number(ratio) for ratio in ratios),
        )
    return shown


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:.2f}'


def said(split: Split, made: Sequence[dict[str, Any]]) -> str:
    """Say in words what is measured, what is not, and how far the planner's times are off."""
    lines = ['Measured: the share on this device. All-reduces: by the model of lmdeploy-vico plan; no rank waited.']
    if split.layers < split.model.size.layers:
        lines.append(f'Times are scaled from {split.layers} layers to {split.model.size.layers}.')
    if known := [row['together']['request_ms'] / row['planned']['request_ms'] for row in made if row['planned']]:
        lines.append(
            f"With all-reduces, a request takes {statistics.mean(known):.2f} times the plan's time on average."
        )
    return ' '.join(lines)
