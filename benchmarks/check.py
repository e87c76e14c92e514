"""Whether anything got slower: the cases of benchmarks/speed.py against stored ones, for an operator's own CI.

What is compared are ratios to fixed references, measured in turns. A case fails only when the fastest of the new rounds
is slower than the slowest of the stored ones by more than the threshold. Both are to be measured on one kind of device,
host and versions, since the references' speed depends on them: anything else is refused; and where nothing else runs,
which cannot be seen afterwards. On a GPU the vision side has a published width (--like), and times in seconds are
stored as well, for people to read.

Exit status: 0 nothing got slower, 1 something did, 2 there is nothing to compare with (make ends with 2 for either).

    make bench-check ARGS=--update       # store what this version does, once for each device
    make bench-check                     # later: fails if something got slower
    make bench-check ARGS='--first-token NEW.json --against OLD.json'     # two results of lmdeploy-vico bench
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import models
from benchmarks.facts import PACKAGES, facts
from benchmarks.regressions import CheckError, Comparison, compare_first_token, differing, read_json, report

CASES = Path(__file__).with_name('speed.py')
RESULTS = Path(__file__).parent / 'results'
THRESHOLD = 0.05
SAME = ('like', 'device', 'processor', 'cores', 'torch_threads', 'python', *PACKAGES, 'cuda')


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
    about = facts()
    kept = []
    for case in results['benchmarks']:
        entry = {'name': case['name'], 'extra_info': {'ratios': [round(r, 4) for r in case['extra_info']['ratios']]}}
        if torch.cuda.is_available():
            entry['stats'] = {name: case['stats'][name] for name in ('min', 'max', 'mean', 'median', 'rounds')}
        kept.append(entry)
    return {'machine_info': {'like': like, **about}, 'datetime': results['datetime'], 'benchmarks': kept}


def ratios(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """The rounds of each case."""
    return {case['name']: case['extra_info']['ratios'] for case in results['benchmarks']}


def read_baseline(path: Path, like: str) -> dict[str, Any]:
    """The stored results; raises :class:`CheckError` where there are none that can be compared with."""
    here = {'like': like, **facts()}
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


def compare(baseline: Mapping[str, Any], measured: Mapping[str, Any], console: Console) -> list[Comparison]:
    """Each case that has been measured and is stored; says which others there are."""
    was, now = ratios(baseline), ratios(measured)
    for name in now:
        if name not in was:
            console.print(f'{name} is new and has no baseline yet.')
    compared = [Comparison(name, was[name], now[name]) for name in now if name in was]
    if not compared:
        raise CheckError('The baseline has none of these cases.')
    return compared


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Whether something got slower; raises :class:`CheckError`."""
    if arguments.first_token:
        new, old = read_json(arguments.first_token), read_json(arguments.against)
        return report(compare_first_token(old, new, console), arguments.threshold, console)
    path = arguments.baseline or default_baseline()
    # Looked at first, so that nobody waits for measurements that cannot be compared.
    baseline = None if arguments.update else read_baseline(path, arguments.like)
    measured = measure(arguments)
    for target in ([arguments.output] if arguments.output else []) + ([path] if arguments.update else []):
        target.write_text(json.dumps(measured, indent=1) + '\n')
        console.print(f'Results: {target}', soft_wrap=True)
    return baseline is not None and report(compare(baseline, measured, console), arguments.threshold, console)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--baseline', type=Path, metavar='FILE', help='(default: by device, in benchmarks/results)')
    parser.add_argument('--update', action='store_true', help='write the baseline instead of comparing with it')
    parser.add_argument('--threshold', type=float, default=THRESHOLD, metavar='SHARE', help=f'(default: {THRESHOLD})')
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
        return int(run(parse(argv), console))
    except CheckError as error:
        print(f'bench-check: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
