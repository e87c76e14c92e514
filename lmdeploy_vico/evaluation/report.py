"""The table of the results, and a plot."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lmdeploy_vico.evaluation import EvaluationError
from lmdeploy_vico.evaluation.scores import NONE, Result

# The router that decides for a whole image in the paper's Table 5 is another one, trained for it.
MEAN_SCORE = "mean score, not the paper's trained image router"


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


def throughputs(path: Path) -> dict[str, float]:
    """Requests per second at each compression, as ``lmdeploy-vico bench`` wrote them, relative to none.

    Raises:
        EvaluationError: the file is not one of its results.
    """
    try:
        cells: list[dict[str, Any]] = json.loads(path.read_text())['results']
        ours = [cell for cell in cells if cell['server'] == 'none' and cell['speedup'] is not None]
        # The share of tokens that was removed; three quarters of a compressed tile's are.
        return {_share(cell['achieved_token_compression']): cell['speedup'] for cell in ours if cell['mode'] == 'image'}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f'{path} does not hold results of `lmdeploy-vico bench`.') from error


def _share(removed: float) -> str:
    return f'{removed:.6f}'


def speed(result: Result, measured: dict[str, float]) -> float:
    """The speed-up at a result's share of removed tokens, between the two that were measured; NaN outside of them."""
    if not result.tiles or result.compressed_tiles is None or not measured:
        return math.nan
    removed = 0.75 * result.compressed_tiles / result.tiles
    shares = sorted((float(share), gain) for share, gain in measured.items())
    for (low, slow), (high, fast) in itertools.pairwise(shares):
        if low - 1e-6 <= removed <= high + 1e-6:
            return slow if high == low else slow + (fast - slow) * (removed - low) / (high - low)
    return math.nan


def draw(path: Path, results: Sequence[Result], measured: dict[str, float]) -> None:
    """What is retained of each data set's score, against first-token throughput (the paper's Figure 1b).

    Without measured throughputs it is drawn against the share of compressed tiles.
    """
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for data in dict.fromkeys(result.data for result in results):
        line = [r for r in results if r.data == data and r.category is None and r.retention is not None]
        points = [(_across(result, measured), result) for result in line]
        points = sorted(((x, result) for x, result in points if not math.isnan(x)), key=lambda point: point[0])
        places, kept = [x for x, _ in points], [float(result.retention or 0) for _, result in points]
        below = [float(r.retention or 0) - float(r.retention_low or 0) for _, r in points]
        above = [float(r.retention_high or 0) - float(r.retention or 0) for _, r in points]
        axis.errorbar(places, kept, yerr=[_positive(below), _positive(above)], marker='o', capsize=3, label=data)
    axis.set(
        xlabel='first-token throughput over no compression' if measured else 'share of compressed tiles',
        ylabel='retained score, %',
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize='small')
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise EvaluationError(f'{path} cannot be written: {error.strerror}.') from error
    finally:
        plt.close(figure)


def _across(result: Result, measured: dict[str, float]) -> float:
    if measured:
        return speed(result, measured)
    if not result.tiles or result.compressed_tiles is None:
        return math.nan
    return result.compressed_tiles / result.tiles


def _positive(values: Sequence[float]) -> list[float]:
    """The interval of a bootstrap need not hold the value itself, and matplotlib draws no negative length."""
    return [max(0.0, value) for value in values]
