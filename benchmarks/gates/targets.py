"""What has been measured on GPUs against what was aimed at: met, missed or not measured.

    python -m benchmarks targets [FOLDER]      results of "on-gpu" (default: benchmarks/results)

Targets are those of an H200. Vision side: tiles/s through the stage, and the time of one picture of 13 tiles. Language
model alone: in each cell of the paper's Table 4 the paper's speed-up for the same model; where the ratio of the FLOP,
which no engine can beat, lies below that, 98 % of the ratio; the same for 8B on TurboMind. For the 241B one rank's
share is measured, and all-reduces are added by a model. With images (8B): 1.5x at half of the visual tokens and 2.15x
at a quarter of them. A number with failed requests misses its target, whatever it is. Of several results for a device,
the last by the file's name counts; with images, one that was taken beside a baseline only where no other is.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.lib.compare import Key, Measured, Target
from lmdeploy_vico.bench.report.paper import SHARES, SPEEDUPS, TILES
from lmdeploy_vico.bench.workload.requests import OURS, OURS_ON_TURBOMIND
from lmdeploy_vico.checkpoints.random.configuration import Size
from lmdeploy_vico.checkpoints.random.published import MODELS
from lmdeploy_vico.config import TOKENS_FULL

LANGUAGE_MODELS = {'8B': '8B', '30B': '30B-A3B', '38B': '38B'}  # the paper's names and ours
SHARED = '241B'  # of which a GPU holds the share of one rank
OF_BOUND = 0.98
IMAGE_MODEL, IMAGE_SPEEDUPS = '8B', {0.5: 1.5, 0.75: 2.15}
TILE_RATES = {'300M': 600.0, '6B': 48.0}
LAYERS = {'300M': 24, '6B': 45}  # fewer, to try a size, are not the model
LATENCY, LATENCY_OF = 60.0, '300M'
LLM_KEYS = {OURS: 'llm', OURS_ON_TURBOMIND: 'llm on turbomind'}  # by the plugin's servers
ANY = 0  # text tokens of a target that holds for all that were measured


def targets() -> list[Target]:
    """All of them, in the order of the table."""
    made = [Target(('tiles', vit), f'ViT-{vit}, stage', rate, 'tiles/s') for vit, rate in TILE_RATES.items()]
    made.append(Target(('latency', LATENCY_OF), f'ViT-{LATENCY_OF}, one picture of 13 tiles', LATENCY, 'ms', True))
    for paper_name, name in LANGUAGE_MODELS.items():
        for text in SPEEDUPS[paper_name]:
            for share in SHARES:
                title = f'{name}, language model alone, {text} text tokens, {share:.0%} removed'
                made.append(Target(('llm', paper_name, text, share), title, llm_target(paper_name, text, share), 'x'))
    for text in SPEEDUPS[IMAGE_MODEL]:
        for share in SHARES:
            title = f'{IMAGE_MODEL} on TurboMind, alone, {text} text tokens, {share:.0%} removed'
            wanted = llm_target(IMAGE_MODEL, text, share)
            made.append(Target(('llm on turbomind', IMAGE_MODEL, text, share), title, wanted, 'x'))
    for text in SPEEDUPS[SHARED]:
        for share in SHARES:
            title = f"{SHARED}, a rank's share, {text} text tokens, {share:.0%} removed"
            made.append(Target(('share', SHARED, text, share), title, llm_target(SHARED, text, share), 'x'))
    for share, speedup in IMAGE_SPEEDUPS.items():
        title = f'{IMAGE_MODEL}, images, {share:.0%} removed'
        made.append(Target(('image', IMAGE_MODEL, ANY, share), title, speedup, 'x'))
    return made


def llm_target(paper_name: str, text_tokens: int, share: float) -> float:
    """The speed-up to reach in a cell of the paper's table."""
    paper = SPEEDUPS[paper_name][text_tokens][SHARES.index(share)]
    size = MODELS[LANGUAGE_MODELS.get(paper_name, paper_name)].size
    bound = round(flop_ratio(size, text_tokens, share), 2)  # as exact as the paper
    return paper if bound >= paper else OF_BOUND * bound


def flop_ratio(size: Size, text_tokens: int, share: float) -> float:
    """How much less a language model has to calculate for a prompt of ten tiles, of which a share is removed."""
    visual = TILES * TOKENS_FULL
    return prefill_flop(size, visual + text_tokens) / prefill_flop(size, visual * (1 - share) + text_tokens)


def prefill_flop(size: Size, tokens: float) -> float:
    """The operations of a prefill, but for the head, which is asked for one token; attention is causal."""
    heads = size.heads * size.head_dim
    attention = size.hidden * (2 * heads + 2 * size.kv_heads * size.head_dim)
    experts = size.experts_per_token * size.expert_mlp
    mlp = 3 * size.hidden * experts + size.hidden * size.experts if size.experts else 3 * size.hidden * size.mlp
    return size.layers * (2 * tokens * (attention + mlp) + 2 * tokens**2 * heads)


def measured(folder: Path) -> dict[str, dict[Key, Measured]]:
    """What the results in a folder say, by device."""
    found: dict[str, dict[Key, Measured]] = {}
    for file in sorted(folder.glob('*.json')):
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if not isinstance(content, dict):
            continue
        readers = {'first_token': _first_token, 'share': _share}
        reader = readers.get(str(content.get('benchmark'))) or (_vision if 'rates' in content else None)
        for key, number in reader(content, file.name) if reader else ():
            numbers = found.setdefault(_device(content), {})
            if not number.beside or key not in numbers or numbers[key].beside:
                numbers[key] = number
    return found


def _device(content: Mapping[str, Any]) -> str:
    about = content.get('facts') or content.get('environment') or {}
    return str(about.get('device') or 'unknown').removesuffix(' x 1')


def _vision(content: Mapping[str, Any], file: str) -> Iterator[tuple[Key, Measured]]:
    """Numbers of ``benchmarks/vision/rates.py``."""
    vit = content['settings']['like']
    if content['settings']['layers'] != LAYERS.get(vit):
        return
    for row in content['rates']:
        if row['part'] == 'stage':
            note = 'disturbed by others' if row['disturbed'] else ''
            yield ('tiles', vit), Measured(row['per_second']['ours'], file, note=note)
    if 'latency' in content:
        yield ('latency', vit), Measured(content['latency']['ours']['median'], file)


def _first_token(content: Mapping[str, Any], file: str) -> Iterator[tuple[Key, Measured]]:
    """Numbers of ``lmdeploy-vico bench``; of several texts in image mode, the lowest speed-up counts."""
    model, note = content['paper_model'], '' if content['complete'] else 'not run to its end'
    if content['arguments']['tiles'] != TILES:
        return
    servers = {cell['server'] for cell in content['cells']}  # a run that was cut off has fewer than it was asked for
    beside = bool(servers.union(content['arguments'].get('baseline', ())) - {OURS})
    lowest: dict[Key, Measured] = {}
    for cell in content['cells']:
        if cell['server'] not in LLM_KEYS or cell['speedup'] is None:
            continue
        number = Measured(cell['speedup'], file, cell['failed'], cell['error'] or note)
        if cell['mode'] == 'llm':
            yield (LLM_KEYS[cell['server']], model, cell['text_tokens'], cell['token_compression']), number
        elif cell['server'] == OURS:
            key = ('image', model, ANY, cell['token_compression'])
            number = replace(number, beside=beside)
            lowest[key] = min(lowest.get(key, number), number, key=lambda one: one.value)
    yield from lowest.items()


def _share(content: Mapping[str, Any], file: str) -> Iterator[tuple[Key, Measured]]:
    """Numbers of ``benchmarks/share``: of all layers, with the all-reduces that were not measured."""
    if content['arguments']['tiles'] != TILES or content['layers'] != content['all_layers']:
        return
    note = 'all-reduces by a model' if content['complete'] else 'not run to its end'
    for cell in content['cells']:
        if (speedup := cell['speedup']['together']) is not None:
            key = ('share', content['model'], cell['text_tokens'], cell['token_compression'])
            yield key, Measured(speedup, file, note=note)


def table(device: str, numbers: Mapping[Key, Measured]) -> Table:
    """All targets, and what a device reached."""
    shown = Table('target', 'at least', 'measured', '', 'file', title=f'Targets of an H200, measured on: {device}')
    for column in (1, 2):
        shown.columns[column].justify = 'right'
    for target in targets():
        bound = f'{"at most " if target.at_most else ""}{_number(target.value, target.unit)}'
        number = numbers.get(target.key)
        if number is None:
            shown.add_row(target.title, bound, '', 'not measured', '')
            continue
        notes = [f'{number.failed} requests failed'] if number.failed else []
        verdict = ', '.join(
            ['met' if target.met(number) else 'MISSED', *notes, *([number.note] if number.note else [])]
        )
        shown.add_row(target.title, bound, _number(number.value, target.unit), verdict, number.file)
    return shown


def _number(value: float, unit: str) -> str:
    return f'{value:.2f}x' if unit == 'x' else f'{value:.1f} {unit}'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=Path, default=RESULTS, help='of results (default: %(default)s)')
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        print(f'targets: {folder} is not a folder', file=sys.stderr)
        return 2
    console = Console(width=150)
    wanted = {target.key for target in targets()}
    devices = {name: numbers for name, numbers in measured(folder).items() if wanted & numbers.keys()}
    for device, numbers in (devices or {'nothing yet': {}}).items():
        console.print(table(device, numbers))
    return 0
