"""The table of the results, and a plot."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from lmdeploy_vico.bench.workload.requests import IMAGE, OURS
from lmdeploy_vico.evaluation import EvaluationError
from lmdeploy_vico.evaluation.scores import NONE, Result

# The router that decides for a whole image in the paper's Table 5 is another one, trained for it.
MEAN_SCORE = "mean score, not the paper's trained image router"
ROUNDING = 1e-6  # of shares of tokens


def table(results: Sequence[Result], units: dict[str, str]) -> Table:
    """A line for each data set, category and compression.

    Args:
        units: of each data set's score.
    """
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ('data', 'compression'):
        shown.add_column(name)
    for name in ('questions', 'score', 'retained, % (95 %)', 'tiles at 64', 'prompt tokens'):
        shown.add_column(name, justify='right')
    for index, result in enumerate(results):
        first = result.compression == NONE
        name = f'{result.data}, {units[result.data]}' if result.category is None else f'  {result.category}'
        last = index + 1 == len(results) or results[index + 1].compression == NONE
        shown.add_row(name if first else '', result.compression, *_cells(result), end_section=last)
    if any(result.compression.startswith('image:') for result in results):
        shown.caption = f'image: {MEAN_SCORE}.'
    return shown


def _cells(result: Result) -> list[str]:
    retained, share = '', ''
    if result.compression != NONE and result.retention is not None:
        retained = f'{result.retention:.1f} ({result.retention_low:.1f} to {result.retention_high:.1f})'
    if result.tiles and result.compressed_tiles is not None:
        share = f'{result.compressed_tiles / result.tiles:.0%}'
    return [str(result.total), f'{result.score:.1f}', retained, share, f'{result.mean_prompt_tokens:.0f}']


Measured = Sequence[tuple[float, float]]  # shares of visual tokens that were removed, and speed-ups, in their order


def throughputs(path: Path) -> Measured:
    """First-token throughput relative to no compression, as ``lmdeploy-vico bench`` wrote it.

    Of several text lengths the shortest counts, and with pictures rather than the language model alone.

    Raises:
        EvaluationError: the file is not one of its results.
    """
    try:
        cells: list[dict[str, Any]] = json.loads(path.read_text(encoding='utf-8'))['cells']
        ours = [cell for cell in cells if cell['server'] == OURS and cell['speedup'] is not None]
        wanted = min((cell['mode'] != IMAGE, cell['text_tokens']) for cell in ours)
        return sorted(
            (float(cell['achieved_token_compression']), float(cell['speedup']))
            for cell in ours
            if (cell['mode'] != IMAGE, cell['text_tokens']) == wanted
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f'{path} does not hold results of `lmdeploy-vico bench`.') from error


def speed(result: Result, measured: Measured) -> float:
    """The speed-up at a result's share of removed tokens, between the two that were measured; NaN outside of them."""
    if not result.tiles or result.compressed_tiles is None:
        return math.nan
    shares, gains = zip(*measured, strict=True)
    # Three quarters of a compressed tile's tokens are removed.
    removed = 0.75 * result.compressed_tiles / result.tiles
    if not shares[0] - ROUNDING <= removed <= shares[-1] + ROUNDING:
        return math.nan
    return float(np.interp(removed, shares, gains))


def draw(path: Path, results: Sequence[Result], measured: Measured) -> Sequence[Result]:
    """Draw what is retained of each data set's score, against first-token throughput (the paper's Figure 1b).

    Without measured throughputs it is drawn against the share of compressed tiles.

    Returns:
        The results that are not in the plot, as their retention, their throughput, or their share is not known.

    Raises:
        EvaluationError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout='constrained')
    left_out = []
    # Experiments are a line of their own: they stand at the same shares as the router's.
    for name, line in _lines(results).items():
        across = [(_across(result, measured), result) for result in line]
        left_out += [result for x, result in across if math.isnan(x)]
        points = sorted((point for point in across if not math.isnan(point[0])), key=lambda point: point[0])
        if not points:
            continue
        places, kept = [x for x, _ in points], [float(result.retention or 0) for _, result in points]
        below = [float(r.retention or 0) - float(r.retention_low or 0) for _, r in points]
        above = [float(r.retention_high or 0) - float(r.retention or 0) for _, r in points]
        axis.errorbar(places, kept, yerr=[_positive(below), _positive(above)], marker='o', capsize=3, label=name)
        for place, (_, result) in zip(zip(places, kept, strict=True), points, strict=True):
            axis.annotate(result.compression, place, xytext=(4, 4), textcoords='offset points', fontsize='x-small')
    axis.set(
        xlabel='first-token throughput over no compression' if measured else 'share of compressed tiles',
        ylabel='retained score, %',
    )
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize='small')
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise EvaluationError(f'{path} cannot be written: {error.strerror}.') from error
    finally:
        plt.close(figure)
    return left_out


def _lines(results: Sequence[Result]) -> dict[str, list[Result]]:
    lines: dict[str, list[Result]] = {}
    for result in results:
        kind, mark, _ = result.compression.partition(':')
        if result.category is None:
            lines.setdefault(f'{result.data}, {kind}' if mark else result.data, []).append(result)
    return lines


def _across(result: Result, measured: Measured) -> float:
    if result.retention is None or not result.tiles or result.compressed_tiles is None:
        return math.nan
    return speed(result, measured) if measured else result.compressed_tiles / result.tiles


def _positive(values: Sequence[float]) -> list[float]:
    """The interval of a bootstrap need not hold the value itself, and matplotlib draws no negative length."""
    return [max(0.0, value) for value in values]
