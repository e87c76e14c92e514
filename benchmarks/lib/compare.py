"""Comparing results: with earlier ones of the same benchmark, with committed counts, and with targets.

Times come in rounds, and the rule for them is one: something got slower when even its fastest round is slower than the
slowest stored one, by more than a threshold. Counts are compared exactly.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

SLOWER, CANNOT_SAY = 1, 2  # exit statuses; 0 where nothing got slower


class CheckError(Exception):
    """A comparison cannot be made; the message says why, and what to do."""


@dataclass(frozen=True)
class Comparison:
    """One thing measured in rounds, before and now; larger is slower.

    Attributes:
        name: what was measured.
        was, now: its rounds; none where it failed.
        note: why getting slower is reported without failing the check; empty where it fails it.
        disturbed: whether other processes kept the machine busy, so that being slower means nothing.
    """

    name: str
    was: Sequence[float]
    now: Sequence[float]
    note: str = ''
    disturbed: bool = False

    @property
    def slower_by(self) -> float:
        """By what share the fastest round now is slower than the slowest one then; negative where rounds overlap."""
        return min(self.now, default=float('inf')) / max(self.was) - 1

    def regressed(self, threshold: float) -> bool:
        """Return whether even the fastest round is slower than the slowest one then, by more than a threshold."""
        return self.slower_by > threshold

    def __str__(self) -> str:
        return f'{self.name} ({self.slower_by:+.1%})' if self.now else f'{self.name} (failed)'


def report(comparisons: Sequence[Comparison], threshold: float, console: Console) -> int:
    """Print the table and a sentence for each kind of result; returns the exit status."""
    regressed = [one for one in comparisons if one.regressed(threshold)]
    noted = [one for one in regressed if one.note]
    unsure = [one for one in regressed if one.disturbed and not one.note]
    slower = [one for one in regressed if not one.disturbed and not one.note]
    table = Table('', 'was', 'is', 'fastest now against slowest then', '', title='Fastest and slowest round')
    for one in comparisons:
        verdict = 'SLOWER' if one in slower else 'disturbed' if one in unsure else 'noted' if one in noted else ''
        change = f'{one.slower_by:+.1%}' if one.now else '-'
        table.add_row(one.name, _span(one.was), _span(one.now), change, verdict)
    console.print(table)
    judged = sum(not one.note for one in comparisons)
    for one in noted:
        console.print(f'Noted: {one}. {one.note}', soft_wrap=True)
    if unsure:
        console.print(
            f'It cannot be said whether {len(unsure)} of {judged} got slower, as other processes kept the machine busy:'
            f' {_listed(unsure)}. Measure again when it is quiet.',
            soft_wrap=True,
        )
    if slower:
        listed = _listed(slower)
        console.print(f'{len(slower)} of {judged} got slower by more than {threshold:.0%}: {listed}.', soft_wrap=True)
    elif not unsure:
        console.print(f'None of {judged} got slower by more than {threshold:.0%}.')
    return SLOWER if slower else CANNOT_SAY if unsure else 0


def report_gone(names: Sequence[str], what: str, console: Console) -> int:
    """Say what is stored but was not measured now; returns the exit status."""
    if names:
        console.print(f'Stored, but not {what}: {", ".join(names)}. Nothing can be said of that.', soft_wrap=True)
    return CANNOT_SAY if names else 0


def _listed(comparisons: Sequence[Comparison]) -> str:
    return ', '.join(map(str, comparisons))


def _span(rounds: Sequence[float]) -> str:
    return f'{min(rounds):.4g} to {max(rounds):.4g}' if rounds else 'failed'


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises :class:`CheckError`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckError(f'{path} cannot be read: {error}') from error
    if not isinstance(content, dict):
        raise CheckError(f'{path} holds no results.')
    return content


def differing(was: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return what differs between two descriptions, in words."""
    return [f'{name} {was.get(name)}, not {now.get(name)}' for name in names if was.get(name) != now.get(name)]


# --- ratios, in rounds -----------------------------------------------------------------------------------------------

QUIET_ROUNDS = 3  # of a case, at least, for it to count as undisturbed


def rounds_that_count(results: Mapping[str, Any], neighbours: float) -> tuple[dict[str, list[float]], set[str]]:
    """Return the rounds of each case in which others used at most ``neighbours`` cores, and the disturbed cases' names.

    A case with fewer than three such rounds is disturbed, and keeps all of its rounds.
    """
    rounds, disturbed = {}, set()
    for case in results['benchmarks']:
        name, info = case['name'], case['extra_info']
        pairs = zip(info['ratios'], info['neighbours'], strict=True)
        quiet = [ratio for ratio, used in pairs if used <= neighbours]
        rounds[name] = quiet if len(quiet) >= QUIET_ROUNDS else info['ratios']
        if len(quiet) < QUIET_ROUNDS:
            disturbed.add(name)
    return rounds, disturbed


def compare_rounds(
    baseline: Mapping[str, Any], measured: Mapping[str, Any], neighbours: float, console: Console
) -> tuple[list[Comparison], list[str]]:
    """Compare what is stored with what has been measured, by case; says which cases are new.

    Returns:
        The comparisons, and the cases that are stored and were not measured.
    """
    (was, disturbed_then), (now, disturbed_now) = (rounds_that_count(one, neighbours) for one in (baseline, measured))
    gone = [name for name in was if name not in now]
    for name in now:
        if name not in was:
            console.print(f'{name} is new and has no baseline yet.')
    disturbed = disturbed_then | disturbed_now
    compared = [Comparison(name, was[name], now[name], disturbed=name in disturbed) for name in now if name in was]
    return compared, gone


# --- counts, exactly -------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A counter that has changed; None where there is no such request or counter."""

    counter: str
    request: str
    was: int | None
    now: int | None


def differences(
    was: Mapping[str, Mapping[str, int]], now: Mapping[str, Mapping[str, int]], left_out: Sequence[str] = ()
) -> list[Difference]:
    """Return every counter of every request that is not the same, but for those left out."""
    found = []
    for request in {**was, **now}:
        before, after = was.get(request, {}), now.get(request, {})
        for counter in {**before, **after}:
            if counter not in left_out and before.get(counter) != after.get(counter):
                found.append(Difference(counter, request, before.get(counter), after.get(counter)))
    return found


# --- targets ---------------------------------------------------------------------------------------------------------

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        key: what a measured number is found by.
        at_most: whether less is better.
    """

    key: Key
    title: str
    value: float
    unit: str
    at_most: bool = False

    def met(self, measured: 'Measured') -> bool:
        """Return whether a number reaches it; one with failed requests does not."""
        reached = measured.value <= self.value if self.at_most else measured.value >= self.value
        return reached and not measured.failed


@dataclass(frozen=True)
class Measured:
    """A number from a result.

    Attributes:
        file: that it stands in.
        failed: requests.
        note: what else is to be said of it, such as that its run was ended early.
        beside: whether a baseline was measured in the same run.
    """

    value: float
    file: str
    failed: int = 0
    note: str = ''
    beside: bool = False


# --- results of ``lmdeploy-vico bench`` ------------------------------------------------------------------------------

OURS = {'none': 'lmdeploy-vico', 'turbomind': 'lmdeploy-vico on TurboMind'}  # the servers that are the plugin
# Arguments that make another benchmark, and what a file that does not name them was measured with.
SAME_RUN: dict[str, Any] = {
    **dict.fromkeys(('num_prompts', 'max_concurrency', 'tiles', 'images', 'seed')),
    'count_prefills': False,
    'server_arguments': [],
    'language_engine': ['pytorch'],
}
# Variables of a server that make no other benchmark: the command sets them; device and engine have been compared.
ANY_VALUE = ('LMDEPLOY_VICO_SYNTHETIC_IMAGES', 'CUDA_VISIBLE_DEVICES', 'LMDEPLOY_VICO_LANGUAGE_ENGINE')
CELL = ('mode', 'server', 'text_tokens', 'token_compression')
NOT_OURS = "That is LMDeploy's code, not the plugin's."
SECONDS_DECIDE = 'Seconds a request decide: a speed-up is also lost when uncompressed requests get faster.'


def compare_first_token(
    old: Mapping[str, Any], new: Mapping[str, Any], console: Console
) -> tuple[list[Comparison], list[str]]:
    """Compare two results of ``lmdeploy-vico bench``, by cell: seconds a request and the inverse of the speed-up.

    The seconds a request of the plugin's own cells decide. Lost speed-ups are only noted, as uncompressed requests that
    got faster cost some too; so are the seconds of a baseline, which is another project. Results of other versions are
    compared, and the versions named; results of another device, model, load or server are refused.

    Returns:
        The comparisons, and the plugin's cells that the new file lacks.

    Raises:
        CheckError: they are not comparable.
    """
    for name, content in (('old', old), ('new', new)):
        if content.get('benchmark') != 'first_token' or not content.get('complete'):
            raise CheckError(f'The {name} file holds no complete results of lmdeploy-vico bench.')
    was, now = _experiment(old), _experiment(new)
    other = differing(was, now, list(now))
    if other:
        raise CheckError(f'These are different experiments; the old one has {"; ".join(other)}.')
    versions = differing(old['environment'], new['environment'], [k for k in new['environment'] if k != 'commit'])
    if versions:
        console.print(f'The old results were measured with {"; ".join(versions)}.', soft_wrap=True)
    before, after = _cells(old), _cells(new)
    compared, gone = [], []
    for cell in before:
        if _answered(before[cell]) and cell in after:
            compared += _compare_cell(cell, (before, old), (after, new))
        elif _answered(before[cell]) and cell[1] in OURS:
            gone.append(_cell_name(cell))
        else:
            console.print(f'{_cell_name(cell)} is not in both files and is not compared.')
    if not compared:
        raise CheckError('The two files have no cell in common.')
    return compared, gone


def _experiment(content: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same for seconds to be comparable.

    The environment variables are those of the plugin's own server. Older files do not name them, and those of a server
    that was running already are not known.
    """
    arguments = content['arguments']
    noted = content.get('environment_variables') or {}
    variables = next((noted[server] for server in OURS if server in noted), None)
    if variables is not None:
        variables = {k: v for k, v in sorted(variables.items()) if k not in ANY_VALUE}
    return {
        'device': content['environment'].get('device'),
        'model': Path(content['model']).name,
        **{name: arguments.get(name, default) for name, default in SAME_RUN.items()},
        'servers running at the same time': bool(content.get('servers_together')) and len(content['servers']) > 1,
        'environment variables': 'that nobody has noted' if variables is None else variables,
    }


_Side = tuple[Mapping[Any, Mapping[str, Any]], Mapping[str, Any]]  # the cells of a file, and the file


def _compare_cell(cell: tuple[Any, ...], old: _Side, new: _Side) -> list[Comparison]:
    """Compare a cell that was answered then: its seconds a request and, if it is the plugin's, its inverse speed-up."""
    ours = cell[1] in OURS
    answered = _answered(new[0][cell])
    seconds = _seconds(cell, *new) if answered else []
    found = [Comparison(f'{_cell_name(cell)}: s/request', _seconds(cell, *old), seconds, '' if ours else NOT_OURS)]
    inverse = _inverse_speedups(cell, old[0]) if ours else []
    inverse_now = _inverse_speedups(cell, new[0]) if inverse and answered else []
    if inverse_now:
        found.append(Comparison(f'{_cell_name(cell)}: 1/speed-up', inverse, inverse_now, SECONDS_DECIDE))
    return found


def _cells(content: Mapping[str, Any]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    return {tuple(cell[name] for name in CELL): cell for cell in content['cells']}


def _cell_name(cell: tuple[Any, ...]) -> str:
    mode, server, text, compression = cell
    name = OURS.get(server, server)
    removed = f'{compression:.0%}' if isinstance(compression, float | int) else compression or 'as it is'
    return f'{mode}, {name}, {text} text tokens, {removed}'


def _answered(cell: Mapping[str, Any]) -> bool:
    return bool(cell['completed']) and not cell['failed'] and not cell['error']


def _seconds(cell: Any, cells: Mapping[Any, Mapping[str, Any]], content: Mapping[str, Any]) -> list[float]:
    """Return seconds a request, round by round."""
    durations, requests = cells[cell]['round_durations'], content['arguments']['num_prompts']
    edges = [requests * turn // len(durations) for turn in range(len(durations) + 1)]
    return [taken / (edges[turn + 1] - edges[turn]) for turn, taken in enumerate(durations)]


def _inverse_speedups(cell: Any, cells: Mapping[Any, Mapping[str, Any]]) -> list[float]:
    """Return a cell's time over the uncompressed cell's, round by round; empty without that one, and for itself."""
    mode, server, text, _ = cell
    reference = (mode, server, text, 0.0)
    if cell == reference or reference not in cells or not _answered(cells[reference]):
        return []
    durations, others = cells[cell]['round_durations'], cells[reference]['round_durations']
    return [mine / other for mine, other in zip(durations, others, strict=True)]
