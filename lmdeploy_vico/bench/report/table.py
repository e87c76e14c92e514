"""Tables, sentences and a plot of the results."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.report.paper import paper_speedup
from lmdeploy_vico.bench.report.results import CellResult
from lmdeploy_vico.bench.workload.requests import AUTO, FLASH, LABELS, OURS, Cell

Results = Mapping[Cell, CellResult]
WORTH = 1.1  # a speed-up below this, at half of the tokens or fewer, needs an explanation
SLOW_SHARE = 0.5


def speedup(results: Results, cell: Cell) -> float:
    """Requests per second over those of the plugin without compression, same mode and text; NaN without either.

    Each language engine of the plugin is compared with itself, a baseline with the first of them.
    """
    alike = (c for c in results if c.is_reference and _row(c)[::2] == _row(cell)[::2])
    reference = next((results[c] for c in alike if c.server == cell.server or not cell.is_ours), None)
    if reference is None or not reference.request_throughput or not results[cell].completed:
        return math.nan
    return results[cell].request_throughput / reference.request_throughput


def _row(cell: Cell) -> tuple[str, str, int]:
    return cell.mode, cell.server, cell.text_tokens


def _column(cell: Cell) -> float | str:
    """A baseline stands in the column of what it does: LMDeploy's flash mode follows the router, the other does not."""
    if cell.compression is not None:
        return cell.compression
    return AUTO if cell.server == FLASH else 0.0


def speedup_table(results: Results, model: str | None, tiles: int) -> Table:
    """Speed-ups in the shape of the paper's Table 4, the paper's own numbers in brackets."""
    columns = sorted({_column(cell) for cell in results}, key=lambda c: math.inf if c == AUTO else float(c))
    table = Table(box=box.SIMPLE_HEAD, title='Requests per second, relative to no compression', pad_edge=False)
    for heading in ('mode', 'server', 'input'):
        table.add_column(heading)
    for column in columns:
        table.add_column(column if isinstance(column, str) else f'{column:.0%}', justify='right', no_wrap=True)
    for row in dict.fromkeys(_row(cell) for cell in results):
        shown = {_column(cell): _speedup(results, cell, model, tiles) for cell in results if _row(cell) == row}
        inputs = f'{tiles} tiles + {row[2]} text tokens'
        table.add_row(row[0], LABELS[row[1]], inputs, *(shown.get(column, '') for column in columns))
    captions = []
    if any(paper_speedup(model, tiles, cell) for cell in results):
        captions.append(f"In brackets: the paper's {model}, Table 4.")
    if len({cell.server for cell in results if cell.is_ours}) > 1:
        captions.append('Each language engine against itself.')
    if any(result.cached for result in results.values()):
        captions.append('*: with the help of a cache, see below.')
    table.caption = ' '.join(captions)
    return table


def _speedup(results: Results, cell: Cell, model: str | None, tiles: int) -> str:
    value, paper = speedup(results, cell), paper_speedup(model, tiles, cell)
    shown = 'failed' if math.isnan(value) else f'{value:.2f}x' + '*' * results[cell].cached
    return f'{shown} ({paper:.2f})' if paper else shown


def detail_table(results: Results) -> Table:
    """Throughput and times to the first token of every cell."""
    headings = ('requests/s', 'input tokens/s', 'TTFT mean', 'p50', 'p90', 'p99', 'failed')
    table = _table(headings, caption='TTFT: time to the first token, ms.')
    for cell, result in results.items():
        achieved = '' if math.isnan(result.achieved_compression) else f' ({result.achieved_compression:.1%})'
        numbers = [result.request_throughput, result.input_throughput]
        times = [result.ttft_ms(percentile) for percentile in (None, 50, 90, 99)]
        table.add_row(
            *_names(cell)[:-1],
            cell.asked + (achieved if cell.is_ours else ''),
            *(f'{number:.1f}' for number in numbers),
            *('-' if math.isnan(time) else f'{time:.0f}' for time in times),
            str(result.failed),
        )
    return table


def token_table(results: Results) -> Table:
    """What a request makes the engine do, on average."""
    table = _table(('prompt tokens', 'of them visual', 'KV blocks', 'prefill steps'), title='The engine, per request')
    for cell, result in results.items():
        if result.completed:
            steps = result.prefill_steps_per_request
            table.add_row(
                *_names(cell),
                f'{result.input_tokens / result.completed:.1f}',
                f'{result.vision_tokens / result.completed:.1f}',
                f'{result.kv_blocks_per_request:.1f}',
                '-' if steps is None else f'{steps:.3f}',
            )
    if all(result.prefill_steps_per_request is None for result in results.values()):
        table.caption = 'Prefill steps are counted with --count-prefills.'
    return table


def _table(numbers: Sequence[str], title: str | None = None, caption: str | None = None) -> Table:
    """A table with a row for each cell, which begins with :func:`_names`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, caption=caption)
    for heading in ('mode', 'server', 'text', 'removed'):
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify='right')
    return table


def _names(cell: Cell) -> tuple[str, str, str, str]:
    return cell.mode, LABELS[cell.server] if cell.is_ours else cell.server, str(cell.text_tokens), cell.asked


def time_table(results: Results) -> Table | None:
    """Where the time went; None if no server told."""
    told = {cell: result.breakdown for cell, result in results.items()}
    if not any(told.values()):
        return None
    headings = ('decode', 'queue', 'tiling', 'ViT', 'hand-over', 'engine queue', 'prefill', 'ViT busy', 'cutting')
    table = _table(headings, title='Where the time went, ms per request')
    for cell, breakdown in told.items():
        if breakdown:
            table.add_row(
                *_names(cell),
                *(f'{1e3 * seconds:.1f}' for seconds in breakdown.parts().values()),
                f'{breakdown.vit_busy:.0%}',
                f'{breakdown.tiling_threads:.1f} threads',
            )
    return table


def sentences(results: Results, tiles: int) -> list[str]:
    """What the tables do not say: cells that failed, caches that helped, and why compression did not."""
    said = []
    for cell, result in results.items():
        if result.error:
            said.append(f'{cell}: failed: {result.error}')
        elif result.failed:
            message, count = result.failures.most_common(1)[0]
            said.append(f'{cell}: {result.failed} requests failed, {count} of them with: {message}')
        half = isinstance(cell.compression, float) and cell.compression >= SLOW_SHARE
        gain = speedup(results, cell)
        if half and gain < WORTH:
            breakdown = result.breakdown
            why = breakdown.bottleneck() if breakdown else 'the server has no /metrics that would say why'
            said.append(f'{cell}: compression gives no speed-up ({gain:.2f}x): {why}.')
    return said + _caches(results)


def _caches(results: Results) -> list[str]:
    said = []
    if tokens := sum(result.cached_tokens for result in results.values()):
        said.append(f'{tokens} prompt tokens came from the prefix cache: start the server without it.')
    if hits := sum(result.tiles_cached for result in results.values() if result.cached):
        said.append(
            f'{hits:.0f} tiles came from the cache of encoded tiles, and the ViT did less than new pictures ask for: '
            'start the server with LMDEPLOY_VICO_CACHE_BYTES=0.'
        )
    return said


def show(console: Console, results: Results, model: str | None, tiles: int) -> None:
    """Print everything."""
    console.print(speedup_table(results, model, tiles))
    console.print(detail_table(results))
    console.print(token_table(results))
    table = time_table(results)
    if table:
        console.print(table)
    for sentence in sentences(results, tiles):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def check_plot(path: Path) -> None:
    """Raises :class:`BenchError` if no plot can be drawn into ``path``."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BenchError('--plot needs matplotlib; in a checkout of the plugin: pip install ".[bench]"') from error
    if path.suffix.lower() != '.png':
        raise BenchError(f'--plot: {path} must end in .png.')
    try:
        existed = path.exists()
        with path.open('ab'):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise BenchError(f'{path} cannot be written: {error.strerror}.') from error


def draw(path: Path, results: Results, model: str | None, tiles: int, title: str) -> None:
    """Speed-up and median time to the first token over the achieved compression, a line for each mode and text."""
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    for mode, server, text in dict.fromkeys(_row(cell) for cell in results):
        line = [c for c in results if _row(c) == (mode, server, text) and results[c].completed]
        label = f'{mode}, {text} text tokens' + ('' if server == OURS else f', {server}')
        line.sort(key=lambda cell: results[cell].achieved_compression)
        removed = [100 * results[cell].achieved_compression for cell in line]
        style = {'marker': 'o'} if line and line[0].is_ours else {'marker': 'x', 'linestyle': 'none'}
        [drawn] = left.plot(removed, [speedup(results, cell) for cell in line], label=label, **style)
        right.plot(removed, [results[cell].ttft_ms(50) for cell in line], label=label, **style)
        paper = {cell: paper_speedup(model, tiles, cell) for cell in line}
        points = [(100 * float(c.compression), p) for c, p in paper.items() if p and isinstance(c.compression, float)]
        if points:
            left.plot(*zip(*points, strict=True), '--', color=drawn.get_color(), alpha=0.5, label=f'{label}, paper')
    for axis, name in ((left, 'requests/s over no compression'), (right, 'median time to first token, ms')):
        axis.set(xlabel='visual tokens removed, %', ylabel=name, ylim=(0, None))
        axis.grid(alpha=0.3)
    left.legend(fontsize='small')
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise BenchError(f'{path} cannot be written: {error.strerror}.') from error
    finally:
        plt.close(figure)
