"""What ``lmdeploy-vico plan`` prints: tables for people, JSON for programs. Both say that nothing was measured."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from lmdeploy_vico.host_memory import GIB
from lmdeploy_vico.planning.calibration.cpu import CpuRatio, cpu_ratios, fit_rates
from lmdeploy_vico.planning.calibration.paper import FITTED_ROWS, OTHER_ROWS, Ratio, ratios, worst
from lmdeploy_vico.planning.constants import FITTED, Fitted
from lmdeploy_vico.planning.deployment import Deployment
from lmdeploy_vico.planning.plan import Cell, Target

NATURE = 'model, not measured'


def show_plan(deployment: Deployment, cells: Sequence[Cell], target: Target, console: Console) -> None:
    """Print a line for each cell, and what the numbers are."""
    columns = ['text', 'removed', 'prompt', 'requests/s', 'speed-up', 'p50 ms', 'p99 ms', 'KV MiB', 'in flight']
    columns += ['bottleneck', *(['GPUs'] if target.rate else [])]
    table = Table(*columns, title=f'{_title(deployment)}: {NATURE}')
    for cell in cells:
        table.add_row(
            str(cell.text_tokens),
            f'{cell.compression:.0%}',
            f'{cell.prompt_tokens:.0f}',
            f'{cell.requests_per_second:.1f}',
            f'{cell.speedup:.2f}',
            _milliseconds(cell.ttft_p50_ms),
            _milliseconds(cell.ttft_p99_ms),
            f'{cell.kv_bytes_per_request / 2**20:.0f}',
            str(cell.requests_in_flight),
            cell.bottleneck,
            *([str(cell.gpus)] if target.rate else []),
        )
    console.print(table)
    rates = {cell.text_tokens: cell.rate for cell in cells}
    shown = ', '.join(f'{rate:.1f} with {text} text tokens' for text, rate in rates.items())
    console.print(
        f'Times to the first token (p50, p99): simulated at a rate of {target.rate:g}/s.'
        if target.rate
        else f'Times to the first token (p50, p99): simulated at a rate of {shown} (70 % of what is possible at 0 %).'
    )
    if any(cell.ttft_p50_ms is None for cell in cells):
        console.print('over: more requests come than are answered; they wait longer and longer.')
    console.print(accuracy())


def _title(deployment: Deployment) -> str:
    servers = f'{deployment.dp} servers of ' if deployment.dp > 1 else ''
    vision = f' and {deployment.vision_devices} to encode' if deployment.vision_devices else ''
    cache = deployment.memory.kv_blocks * deployment.memory.cache.block / GIB
    return (
        f'{deployment.model} on {servers}{deployment.tp} x {deployment.gpu.name}{vision}, '
        f'{cache:.1f} GiB of KV cache on each'
    )


def _milliseconds(value: float | None) -> str:
    return 'over' if value is None else f'{value:.0f}'


def accuracy() -> str:
    """Say in a paragraph how far the model is off what it is checked against."""
    fitted, others = ratios(rows=[FITTED_ROWS]), ratios(rows=[OTHER_ROWS])
    return (
        f"{NATURE.capitalize()}. Its speed-ups of the language model alone are off the paper's Table 4 by "
        f'{worst(fitted):.1%} at most in the 12 ratios that two of its constants are fitted to, and by '
        f'{worst(others):.1%} in the 12 others. Six ratios measured on a CPU: off by '
        f'{worst(cpu_ratios()):.1%} at most. No GPU has confirmed a rate or a time. '
        'lmdeploy-vico plan --check shows all.'
    )


def plan_as_json(deployment: Deployment, cells: Sequence[Cell], target: Target) -> dict[str, Any]:
    """Return what :func:`show_plan` prints, with bytes, milliseconds, and requests/s."""
    return {
        'nature': NATURE,
        'model': deployment.model,
        'gpu': deployment.gpu.name,
        'tp': deployment.tp,
        'dp': deployment.dp,
        'vision_devices': deployment.vision_devices,
        'gpus': deployment.gpus,
        'kv_bytes_per_gpu': deployment.memory.kv_blocks * deployment.memory.cache.block,
        'requests_simulated': target.requests,
        'seed': target.seed,
        'cells': [asdict(cell) for cell in cells],
        'errors': _errors(ratios(), cpu_ratios()),
    }


def check_as_json(again: Fitted) -> dict[str, Any]:
    """Return what :func:`show_check` prints."""
    compared = [asdict(ratio) | {'error': ratio.error} for ratio in ratios()]
    fits = {'fitted': asdict(FITTED), 'fitted_again': asdict(again)}
    return {'nature': NATURE, **fits, 'table_4': compared, 'errors': _errors(ratios(), cpu_ratios())}


def _errors(compared: Sequence[Ratio], cpu: Sequence[CpuRatio]) -> dict[str, Any]:
    return {
        f'table_4_{text}_text_tokens': worst([ratio for ratio in compared if ratio.text_tokens == text])
        for text in (FITTED_ROWS, OTHER_ROWS)
    } | {'cpu_llm_mode': [asdict(ratio) | {'error': ratio.error} for ratio in cpu]}


def show_check(again: Fitted, console: Console) -> None:
    """Print the ratios of Table 4, that of the CPU, and the constants as they are and as they are fitted again."""
    table = Table(
        'model', 'text', 'removed', 'paper', 'model', 'error', 'unfitted', title=f'Table 4 of the paper: {NATURE}'
    )
    for ratio, unfitted in zip(ratios(), ratios(Fitted(0.0)), strict=True):
        table.add_row(
            ratio.model,
            str(ratio.text_tokens),
            f'{ratio.compression:.0%}',
            f'{ratio.paper:.2f}',
            f'{ratio.ours:.3f}',
            f'{ratio.error:+.1%}',
            f'{unfitted.error:+.1%}',
        )
    console.print(table)
    fitted, others = ratios(rows=[FITTED_ROWS]), ratios(rows=[OTHER_ROWS])
    console.print(
        f'Largest error: {worst(fitted):.1%} with 64 text tokens, to which two constants are fitted; '
        f'{worst(others):.1%} with 512; {worst(ratios(Fitted(0.0))):.1%} if both were 0.'
    )
    for name, times in (('In use', FITTED), ('Fitted again', again)):
        more = ', '.join(f'{1e6 * seconds:.0f} more for the {model}' for model, seconds in times.more.items())
        console.print(f'{name}: {1e6 * times.request:.0f} us for each prompt, {more}.')
    console.print(_cpu_table())
    rates = fit_rates()
    console.print(
        f'Fitted to the rows with 64 text tokens: {1e-9 * rates.products:.1f} GFLOP/s of one core in products, '
        f'{1e-9 * rates.attention:.0f} in attention. Largest error of a ratio: {worst(cpu_ratios()):.1%}.'
    )


def _cpu_table() -> Table:
    table = Table('text', 'removed', 'requests/s', 'model', 'processor time', 'model', 'error', 'one rate')
    table.title = "A CPU's language model alone, slowest and fastest of three runs (benchmarks/results/llm-cpu-N.json)"
    for ratio in cpu_ratios():
        pairs = ((ratio.requests, ratio.ours_by_requests), (ratio.processor, ratio.ours))
        both = (text for runs, ours in pairs for text in (f'{min(runs):.2f} to {max(runs):.2f}', f'{ours:.2f}'))
        shown = (f'{ratio.error:+.1%}', f'{ratio.flops:.2f}')
        table.add_row(str(ratio.text_tokens), f'{ratio.compression:.0%}', *both, *shown)
    return table
