"""When something counts as slower than it was, and what is said of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


class CheckError(Exception):
    """What keeps a comparison from being made, and what to do about it, in a sentence."""


@dataclass(frozen=True)
class Comparison:
    """One thing measured in rounds, before and now; larger is slower.

    Attributes:
        name: what was measured.
        was, now: its rounds; none where it failed.
    """

    name: str
    was: Sequence[float]
    now: Sequence[float]

    @property
    def slower_by(self) -> float:
        """How much slower the fastest round is than the slowest was, as a share; negative where rounds overlap."""
        return min(self.now, default=float('inf')) / max(self.was) - 1

    def regressed(self, threshold: float) -> bool:
        """Whether even the fastest round is slower than the slowest was, by more than a threshold."""
        return self.slower_by > threshold


def report(comparisons: Sequence[Comparison], threshold: float, console: Console) -> bool:
    """Print the table and a sentence; returns whether something got slower."""
    slower = [one for one in comparisons if one.regressed(threshold)]
    table = Table('', 'was', 'is', 'fastest now against slowest then', '', title='Fastest and slowest round')
    for one in comparisons:
        change = f'{one.slower_by:+.1%}' if one.now else '-'
        table.add_row(one.name, _span(one.was), _span(one.now), change, 'SLOWER' if one in slower else '')
    console.print(table)
    if slower:
        console.print(
            f'{len(slower)} of {len(comparisons)} got slower by more than {threshold:.0%}: '
            + ', '.join(f'{one.name} ({one.slower_by:+.1%})' if one.now else f'{one.name} (failed)' for one in slower)
            + '.',
            soft_wrap=True,
        )
    else:
        console.print(f'None of {len(comparisons)} got slower by more than {threshold:.0%}.')
    return bool(slower)


def _span(rounds: Sequence[float]) -> str:
    return f'{min(rounds):.4g} to {max(rounds):.4g}' if rounds else 'failed'


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises :class:`CheckError`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckError(f'{path} cannot be read: {error}') from error
    if not isinstance(content, dict):
        raise CheckError(f'{path} holds no results.')
    return content


def differing(was: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What differs of two descriptions, in words."""
    return [f'{name} {was.get(name)}, not {now.get(name)}' for name in names if was.get(name) != now.get(name)]


SAME_RUN = ('num_prompts', 'max_concurrency', 'tiles', 'images', 'seed')  # options that make another benchmark
CELL = ('mode', 'server', 'text_tokens', 'token_compression')


def compare_first_token(old: Mapping[str, Any], new: Mapping[str, Any], console: Console) -> list[Comparison]:
    """Compare two results of ``lmdeploy-vico bench``: seconds a request and the inverse of the speed-up, by cell.

    Other versions are what one may want to compare, and are said; another device, model or load is refused.

    Raises:
        CheckError: they are not comparable.
    """
    for name, content in (('old', old), ('new', new)):
        if content.get('benchmark') != 'first_token' or not content.get('complete'):
            raise CheckError(f'The {name} file holds no complete results of lmdeploy-vico bench.')
    other = differing(old['environment'], new['environment'], ['device'])
    other += differing(*({'model': Path(side['model']).name} for side in (old, new)), ['model'])
    other += differing(old['arguments'], new['arguments'], SAME_RUN)
    if other:
        raise CheckError(f'These are different experiments; the old one has {"; ".join(other)}.')
    versions = differing(old['environment'], new['environment'], [k for k in new['environment'] if k != 'commit'])
    if versions:
        console.print(f'The old results were measured with {"; ".join(versions)}.', soft_wrap=True)
    before, after = _cells(old), _cells(new)
    compared = []
    for cell in before:
        if not _answered(before[cell]) or cell not in after:
            console.print(f'{_cell_name(cell)} is not in both files and is not compared.')
            continue
        for what, rounds in (('s/request', _seconds), ('1/speed-up', _inverse_speedups)):
            was = rounds(before, cell, old)
            if was:
                now = rounds(after, cell, new) if _answered(after[cell]) else []
                compared.append(Comparison(f'{_cell_name(cell)}: {what}', was, now))
    if not compared:
        raise CheckError('The two files have no cell in common.')
    return compared


def _cells(content: Mapping[str, Any]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    return {tuple(cell[name] for name in CELL): cell for cell in content['cells']}


def _cell_name(cell: tuple[Any, ...]) -> str:
    mode, server, text, compression = cell
    name = 'lmdeploy-vico' if server == 'none' else server
    removed = f'{compression:.0%}' if isinstance(compression, float | int) else compression or 'as it is'
    return f'{mode}, {name}, {text} text tokens, {removed}'


def _answered(cell: Mapping[str, Any]) -> bool:
    return bool(cell['completed']) and not cell['failed'] and not cell['error']


def _seconds(cells: Mapping[Any, Any], cell: Any, content: Mapping[str, Any]) -> list[float]:
    """Seconds a request, round by round."""
    durations, requests = cells[cell]['round_durations'], content['arguments']['num_prompts']
    edges = [requests * turn // len(durations) for turn in range(len(durations) + 1)]
    return [taken / (edges[turn + 1] - edges[turn]) for turn, taken in enumerate(durations)]


def _inverse_speedups(cells: Mapping[Any, Any], cell: Any, content: Mapping[str, Any]) -> list[float]:
    """Time over that of the plugin without compression, round by round; empty for that one itself or without it."""
    mode, _, text, _ = cell
    reference = (mode, 'none', text, 0.0)
    if cell == reference or reference not in cells or not _answered(cells[reference]):
        return []
    durations, others = cells[cell]['round_durations'], cells[reference]['round_durations']
    return [mine / other for mine, other in zip(durations, others, strict=True)]
