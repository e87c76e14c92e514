"""What is printed and drawn about a calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lmdeploy_vico.evaluation.scores import Result
from lmdeploy_vico.inspection import InspectionError
from lmdeploy_vico.inspection.calibration import Calibration, Point

if TYPE_CHECKING:
    from rich.table import Table

Judged: TypeAlias = tuple[Point, Result]  # a point, and what a data set scores there

ALL = 'all'
STEPS = 200  # of a curve


def kinds_table(calibration: Calibration, before: Point, after: Point) -> 'Table':
    """What two thresholds do to each kind of picture: how many of its tiles they compress, what that saves."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, caption='tiles: thumbnails included; saved: of the visual tokens')
    table.add_column('kind', overflow='fold')
    names = [f'at {point.threshold:g}' for point in (before, after)]
    for column in ('pictures', 'tiles', *(f'{what} {name}' for name in names for what in ('at 64,', 'saved,'))):
        table.add_column(column, justify='right')
    found = [calibration.by_kind(point.threshold) for point in (before, after)]
    rows = {kind: [each[kind] for each in found] for kind in found[0]}
    if len(rows) > 1:
        rows[ALL] = [before, after]
    for kind, points in rows.items():
        pictures = sum(kind in (ALL, prompt.kind) for prompt in calibration.prompts)
        cells = [cell for point in points for cell in (f'{point.share:.0%}', f'{point.saved:.0%}')]
        table.add_row(escape(kind), str(pictures), str(points[0].tiles), *cells)
    return table


def points_table(judged: Sequence[Judged]) -> 'Table':
    """The score at each threshold."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, caption='retained: of the score without compression, with a 95 % interval')
    for column in ('threshold', 'tiles at 64', 'tokens saved', 'score', 'retained'):
        table.add_column(column, justify='right')
    for point, result in judged:
        retained = 'not known'
        if result.retention is not None:
            retained = f'{result.retention:.1f} ({result.retention_low:.1f} to {result.retention_high:.1f})'
        table.add_row(
            f'{point.threshold:g}', f'{point.share:.0%}', f'{point.saved:.0%}', f'{result.score:.2f}', retained
        )
    return table


def draw(path: Path, calibration: Calibration, after: Point, judged: Sequence[Judged]) -> None:
    """Draw the share of compressed tiles against the threshold; below it, what is retained of a score.

    Raises:
        InspectionError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot as plt

    rows = 1 + bool(judged)
    figure, axes = plt.subplots(rows, 1, figsize=(7, 4 * rows), layout='constrained', squeeze=False)
    _draw_shares(axes[0, 0], calibration, after)
    if judged:
        _draw_scores(axes[1, 0], judged)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise InspectionError(f'{path} cannot be written: {error.strerror}.') from error
    finally:
        plt.close(figure)


def _draw_shares(axis: Any, calibration: Calibration, after: Point) -> None:
    thresholds = [step / STEPS for step in range(STEPS + 1)]
    kinds: dict[str, list[float]] = {}
    for threshold in thresholds:
        for kind, point in calibration.by_kind(threshold).items():
            kinds.setdefault(kind, []).append(100 * point.share)
    for kind, shares in kinds.items():
        axis.plot(thresholds, shares, label=kind)
    if len(kinds) > 1:
        axis.plot(thresholds, [100 * calibration.at(one).share for one in thresholds], 'k', label=ALL)
        axis.legend(fontsize='small')
    axis.axvline(after.threshold, color='grey', linestyle=':')
    axis.set(xlabel='absolute threshold', ylabel='tiles at 64 tokens, %')
    axis.grid(alpha=0.3)


def _draw_scores(axis: Any, judged: Sequence[Judged]) -> None:
    known = [
        (100 * point.saved, result.retention, result.retention_low or 0.0, result.retention_high or 0.0)
        for point, result in sorted(judged, key=lambda each: each[0].saved)
        if result.retention is not None
    ]
    places, kept, low, high = zip(*known, strict=True) if known else ((), (), (), ())
    below = [max(0.0, one - other) for one, other in zip(kept, low, strict=True)]
    above = [max(0.0, other - one) for one, other in zip(kept, high, strict=True)]
    axis.errorbar(places, kept, yerr=[below, above], marker='o', capsize=3)
    axis.set(xlabel='visual tokens saved, %', ylabel='retained score, %')
    axis.grid(alpha=0.3)
