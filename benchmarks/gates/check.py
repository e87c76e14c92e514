"""Whether anything got slower: the cases of benchmarks/gates/cases.py against stored ones, for an operator's own CI.

What is compared are ratios to fixed references, measured in turns. A case fails only when the fastest of the new rounds
is slower than the slowest of the stored ones by more than the threshold. Both are to be measured on one kind of device,
host and versions, since the references' speed depends on them: anything else is refused. Rounds in which other
processes used more than --neighbours cores do not count, as long as there are three others. Where there are not,
nothing is stored, and a case that seems slower may only be disturbed. On a GPU the vision side has a published width
(--like), and times in seconds are stored as well, for people to read.

Exit status: 0 nothing got slower, 1 something did, 2 it cannot be said (make ends with 2 for either).

    make bench-check ARGS=--update       # store what this version does, once for each device
    make bench-check                     # later: fails if something got slower
    make bench-check ARGS='--first-token NEW.json --against OLD.json'     # two results of lmdeploy-vico bench
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import RESULTS
from benchmarks.gates import cases
from benchmarks.lib import models
from benchmarks.lib.compare import (
    CANNOT_SAY,
    CheckError,
    Comparison,
    compare_first_token,
    differing,
    read_json,
    report,
    report_gone,
)
from benchmarks.lib.facts import PACKAGES, facts
from benchmarks.lib.timing import QUIET
from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.results import OutputFile

CASES = Path(cases.__file__)
THRESHOLD = 0.05
QUIET_ROUNDS = 3  # of a case, at least, for it to count as undisturbed
CONDITIONS = ('recipe', 'omp_wait_policy', 'like')
SAME = (*CONDITIONS, 'device', 'processor', 'cores', 'torch_threads', 'python', *PACKAGES, 'cuda')


def conditions(like: str) -> dict[str, Any]:
    """What ratios depend on, for the results; threads that spin while they wait take a core from whoever works."""
    own = (cases.RECIPE, os.environ.get('OMP_WAIT_POLICY'), like)
    return {**dict(zip(CONDITIONS, own, strict=True)), **facts()}


def default_baseline() -> Path:
    """Where the ratios of this kind of device are stored."""
    device = re.sub(r'[^a-z0-9]+', '-', str(facts()['device']).lower())
    return RESULTS / f'check-{device}.json'


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the cases, through pytest-benchmark; what is stored of them, in the names that it uses.

    Raises:
        CheckError: a case could not be measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'speed.json'
        options = ['-q', '--no-header', '--benchmark-quiet', f'--benchmark-json={file}', f'--like={arguments.like}']
        options += [f'--turns={arguments.turns}', '-o', f'python_files={CASES.name}']
        options += ['-p', 'no:cacheprovider', '-p', 'no:faulthandler']
        if arguments.cases:
            options += ['-k', ' or '.join(arguments.cases)]
        status = pytest.main([str(CASES), *options])
        if status or not file.is_file():
            raise CheckError('The cases could not be measured; what pytest says above is why.')
        return stored(json.loads(file.read_text()), arguments.like)


def stored(results: Mapping[str, Any], like: str) -> dict[str, Any]:
    """What is kept of pytest-benchmark's results: no host names; seconds of a GPU only, as a CPU's say little."""
    kept = []
    for case in results['benchmarks']:
        rounds = case['extra_info']
        info = {'ratios': [round(r, 4) for r in rounds['ratios']]}
        entry = {'name': case['name'], 'extra_info': info | {'neighbours': [round(n, 2) for n in rounds['neighbours']]}}
        if torch.cuda.is_available():
            entry['stats'] = {name: case['stats'][name] for name in ('min', 'max', 'mean', 'median', 'rounds')}
        kept.append(entry)
    return {'machine_info': conditions(like), 'datetime': results['datetime'], 'benchmarks': kept}


def ratios(results: Mapping[str, Any], neighbours: float) -> tuple[dict[str, list[float]], set[str]]:
    """The rounds of each case that count, and the names of the disturbed cases: of these all rounds count, for once."""
    rounds, disturbed = {}, set()
    for case in results['benchmarks']:
        name, info = case['name'], case['extra_info']
        pairs = zip(info['ratios'], info['neighbours'], strict=True)
        quiet = [ratio for ratio, used in pairs if used <= neighbours]
        rounds[name] = quiet if len(quiet) >= QUIET_ROUNDS else info['ratios']
        if len(quiet) < QUIET_ROUNDS:
            disturbed.add(name)
    return rounds, disturbed


def read_baseline(path: Path, like: str) -> dict[str, Any]:
    """The stored results; raises :class:`CheckError` where there are none that can be compared with."""
    here = conditions(like)
    make = 'On the version to compare with, run: make bench-check ARGS=--update'
    if not path.is_file():
        raise CheckError(f'There is no baseline for {here["device"]} at {path}. {make}')
    baseline = read_json(path)
    if 'benchmarks' not in baseline or 'machine_info' not in baseline:
        raise CheckError(f'{path} holds no results of this check. {make}')
    other = differing(baseline['machine_info'], here, SAME)
    if other:
        raise CheckError(
            f'{path} cannot be compared with, as ratios depend on what it was measured with: {"; ".join(other)}. {make}'
        )
    return baseline


def compare(
    baseline: Mapping[str, Any], measured: Mapping[str, Any], arguments: argparse.Namespace, console: Console
) -> int:
    """Compare what is stored and what has been measured, and say what is in one of them only; the exit status.

    With --cases, others are not missed.
    """
    (was, disturbed_then), (now, disturbed_now) = (ratios(one, arguments.neighbours) for one in (baseline, measured))
    for name in now:
        if name not in was:
            console.print(f'{name} is new and has no baseline yet.')
    missed = report_gone([] if arguments.cases else [name for name in was if name not in now], 'measured', console)
    disturbed = disturbed_then | disturbed_now
    compared = [Comparison(name, was[name], now[name], disturbed=name in disturbed) for name in now if name in was]
    if not compared:
        raise CheckError('The baseline has none of these cases.')
    return report(compared, arguments.threshold, console) or missed


def compare_results(arguments: argparse.Namespace, console: Console) -> int:
    """Compare two results of ``lmdeploy-vico bench``; the exit status."""
    new, old = read_json(arguments.first_token), read_json(arguments.against)
    compared, gone = compare_first_token(old, new, console)
    missed = report_gone(gone, 'in the new file', console)
    return report(compared, arguments.threshold, console) or missed


def check(arguments: argparse.Namespace, path: Path, console: Console) -> int:
    """Measure and compare with the baseline at ``path``; the exit status."""
    output = writable(arguments.output)
    # Looked at first, so that nobody waits for measurements that cannot be compared.
    baseline = read_baseline(path, arguments.like)
    measured = measure(arguments)
    write(output, measured, console)
    return compare(baseline, measured, arguments, console)


def update(arguments: argparse.Namespace, path: Path, console: Console) -> None:
    """Measure and store, having said how that compares with what is replaced, if it does."""
    output, target = writable(arguments.output), writable(path)
    if arguments.cases and path.is_file():
        check_kept(path, arguments.cases)
    old, why = None, ''
    if path.is_file():
        try:
            old = read_baseline(path, arguments.like)
        except CheckError as error:
            why = str(error).partition(' On the version')[0]
    measured = measure(arguments)
    write(output, measured, console)
    if old:
        console.print(f'Against what is stored in {path}:', soft_wrap=True)
        with contextlib.suppress(CheckError):  # no case in common
            compare(old, measured, arguments, console)
    elif why:
        console.print(why, soft_wrap=True)
    _, disturbed = ratios(measured, arguments.neighbours)
    if disturbed:
        raise CheckError(
            f'Nothing is stored, as other processes used more than {arguments.neighbours} cores while these were '
            f'measured: {", ".join(sorted(disturbed))}. Run it when the machine is quiet.'
        )
    write(target, measured, console)


def check_kept(path: Path, cases: Sequence[str]) -> None:
    """Raises :class:`CheckError` where storing these cases alone would lose others."""
    try:
        names = [case['name'] for case in read_json(path)['benchmarks']]
    except (CheckError, LookupError, TypeError):
        return  # these are no results
    lost = [name for name in names if not any(case.lower() in name.lower() for case in cases)]
    if lost:
        raise CheckError(f'{path} also holds {", ".join(lost)}, which would be lost: store all cases, without --cases.')


def writable(path: Path | None) -> OutputFile | None:
    """The file to write later; raises :class:`CheckError` where that would fail, before anything is measured."""
    if path is None:
        return None
    try:
        OutputFile(path).check()
    except BenchError as error:
        raise CheckError(str(error)) from error
    return OutputFile(path)


def write(file: OutputFile | None, results: Mapping[str, Any], console: Console) -> None:
    """Write results, if there is a file for them."""
    if file is None:
        return
    try:
        file.write(results)
    except BenchError as error:
        raise CheckError(str(error)) from error
    console.print(f'Results: {file.path}', soft_wrap=True)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """The exit status; raises :class:`CheckError`."""
    if arguments.first_token:
        return compare_results(arguments, console)
    path = arguments.baseline or default_baseline()
    if arguments.update:
        update(arguments, path, console)
        return 0
    return check(arguments, path, console)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--baseline', type=Path, metavar='FILE', help='(default: by device, in benchmarks/results)')
    parser.add_argument('--update', action='store_true', help='write the baseline instead of comparing with it')
    parser.add_argument('--threshold', type=float, default=THRESHOLD, metavar='SHARE', help=f'(default: {THRESHOLD})')
    parser.add_argument(
        '--neighbours', type=float, default=QUIET, metavar='CORES', help=f'that others may use (default: {QUIET})'
    )
    parser.add_argument('--output', type=Path, metavar='FILE', help='also write what is measured to this file')
    parser.add_argument('--cases', nargs='+', metavar='CASE', help='only those with these words in their names')
    parser.add_argument('--turns', type=int, default=5, help='in each of the five rounds of a case (default: 5)')
    parser.add_argument(
        '--like', choices=list(models.SIZES), default='300M' if cuda else 'tiny', help='size of the ViT'
    )
    parser.add_argument('--first-token', type=Path, metavar='NEW', help='compare results of lmdeploy-vico bench')
    parser.add_argument('--against', type=Path, metavar='OLD', help='with those')
    arguments = parser.parse_args(argv)
    if bool(arguments.first_token) != bool(arguments.against):
        parser.error('--first-token and --against go together.')
    if arguments.turns < 1:
        parser.error('--turns must be at least 1.')
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    console = Console(width=150)
    try:
        return run(parse(argv), console)
    except CheckError as error:
        print(f'bench-check: {error}', file=sys.stderr)
        return CANNOT_SAY
