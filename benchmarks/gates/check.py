"""Compare the cases of benchmarks/gates/cases.py with a stored baseline, for an operator's own CI.

Each case is timed in rounds, as a ratio to a fixed reference that takes turns with it. A case counts as slower when
even its fastest round is slower than the slowest stored round, by more than the threshold. The references' speed
depends on device, host and versions: a baseline from another machine or version is refused. Rounds in which other
processes used more than --neighbours cores are left out, as long as three others remain. If fewer remain, nothing is
stored, and a case that seems slower is reported as disturbed. On a GPU the vision side has a published width (--like),
and times in seconds are stored as well, for people to read.

Exit status: 0 nothing got slower, 1 something got slower, 2 it cannot be told (make ends with 2 for either).

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
    compare_first_token,
    compare_rounds,
    differing,
    read_json,
    report,
    report_gone,
    rounds_that_count,
)
from benchmarks.lib.facts import PACKAGES, facts
from benchmarks.lib.timing import QUIET
from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.report.results import OutputFile

CASES = Path(cases.__file__)
THRESHOLD = 0.05
CONDITIONS = ('recipe', 'omp_wait_policy', 'like')
SAME = (*CONDITIONS, 'device', 'processor', 'cores', 'torch_threads', 'python', *PACKAGES, 'cuda')


def conditions(like: str) -> dict[str, Any]:
    """Return what ratios depend on. OMP_WAIT_POLICY is among it: threads that spin while they wait take a core."""
    own = (cases.RECIPE, os.environ.get('OMP_WAIT_POLICY'), like)
    return {**dict(zip(CONDITIONS, own, strict=True)), **facts()}


def default_baseline() -> Path:
    """Return where the ratios of this kind of device are stored."""
    device = re.sub(r'[^a-z0-9]+', '-', str(facts()['device']).lower())
    return RESULTS / f'check-{device}.json'


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the cases through pytest-benchmark and return what is stored of them, in its names.

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
    """Return what is kept of pytest-benchmark's results: no host names, and seconds only of a GPU."""
    kept = []
    for case in results['benchmarks']:
        rounds = case['extra_info']
        info = {'ratios': [round(r, 4) for r in rounds['ratios']]}
        entry = {'name': case['name'], 'extra_info': info | {'neighbours': [round(n, 2) for n in rounds['neighbours']]}}
        if torch.cuda.is_available():
            entry['stats'] = {name: case['stats'][name] for name in ('min', 'max', 'mean', 'median', 'rounds')}
        kept.append(entry)
    return {'machine_info': conditions(like), 'datetime': results['datetime'], 'benchmarks': kept}


def read_baseline(path: Path, like: str) -> dict[str, Any]:
    """Return the stored results; raises :class:`CheckError` where there are none that can be compared with."""
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
    """Compare what has been measured with the baseline; returns the exit status. With --cases, no other is missed."""
    compared, gone = compare_rounds(baseline, measured, arguments.neighbours, console)
    missed = report_gone([] if arguments.cases else gone, 'measured', console)
    if not compared:
        raise CheckError('The baseline has none of these cases.')
    return report(compared, arguments.threshold, console) or missed


def compare_results(arguments: argparse.Namespace, console: Console) -> int:
    """Compare two results of ``lmdeploy-vico bench``; returns the exit status."""
    new, old = read_json(arguments.first_token), read_json(arguments.against)
    compared, gone = compare_first_token(old, new, console)
    missed = report_gone(gone, 'in the new file', console)
    return report(compared, arguments.threshold, console) or missed


def check(arguments: argparse.Namespace, path: Path, console: Console) -> int:
    """Measure and compare with the baseline at ``path``; returns the exit status."""
    output = writable(arguments.output)
    # Looked at first, so that nobody waits for measurements that cannot be compared.
    baseline = read_baseline(path, arguments.like)
    measured = measure(arguments)
    write(output, measured, console)
    return compare(baseline, measured, arguments, console)


def update(arguments: argparse.Namespace, path: Path, console: Console) -> None:
    """Measure and store; a baseline that is replaced is compared with first, where it can be."""
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
    _, disturbed = rounds_that_count(measured, arguments.neighbours)
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
    """Return the file to write later; raises :class:`CheckError` now if it cannot be written."""
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
    """Do what the arguments ask; returns the exit status. Raises :class:`CheckError`."""
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
    parser.add_argument(
        '--baseline',
        type=Path,
        metavar='FILE',
        help='compare with this file, or write it with --update (default: check-DEVICE.json in benchmarks/results)',
    )
    parser.add_argument('--update', action='store_true', help='write the baseline instead of comparing with it')
    parser.add_argument(
        '--threshold',
        type=float,
        default=THRESHOLD,
        metavar='SHARE',
        help='how much slower a case must be to count as slower, as a share of its time (default: %(default)s)',
    )
    parser.add_argument(
        '--neighbours',
        type=float,
        default=QUIET,
        metavar='CORES',
        help='leave out rounds in which other processes used more than this many cores (default: %(default)s)',
    )
    parser.add_argument(
        '--output', type=Path, metavar='FILE', help='also write the measurements, as JSON, to this file'
    )
    parser.add_argument(
        '--cases', nargs='+', metavar='WORD', help='measure only the cases with one of these words in their names'
    )
    parser.add_argument(
        '--turns', type=int, default=5, help='turns of each of the five rounds of a case (default: %(default)s)'
    )
    parser.add_argument(
        '--like',
        choices=list(models.SIZES),
        default='300M' if cuda else 'tiny',
        help='size of the ViT with random weights that is measured (default: %(default)s)',
    )
    parser.add_argument(
        '--first-token',
        type=Path,
        metavar='NEW',
        help='measure nothing: compare this result of lmdeploy-vico bench with the one of --against',
    )
    parser.add_argument(
        '--against', type=Path, metavar='OLD', help='the earlier result that --first-token is compared to'
    )
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
