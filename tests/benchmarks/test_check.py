"""``benchmarks/check.py``: a slowed build fails, an unchanged one passes, and what cannot be compared is refused."""

import copy
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from benchmarks import check
from benchmarks.facts import facts
from benchmarks.regressions import Comparison
from lmdeploy_vico import cli
from lmdeploy_vico.vision import tiling

ROOT = Path(__file__).parents[2]
SETTINGS = ('--like', 'tiny', '--cases', 'cutting', '--turns', '3')


def test_a_slowed_build_fails(tmp_path, monkeypatch, capsys):
    options = ['--baseline', str(tmp_path / 'check.json'), *SETTINGS]
    assert check.main([*options, '--update']) == 0
    assert check.main(options) == 0
    assert 'None of 1 got slower' in capsys.readouterr().out

    cut_tiles = tiling.cut_tiles

    def twice(*arguments):
        cut_tiles(*arguments)
        return cut_tiles(*arguments)

    monkeypatch.setattr(tiling, 'cut_tiles', twice)
    assert check.main([*options, '--output', str(tmp_path / 'slow.json')]) == 1
    assert '1 of 1 got slower by more than 5%: test_cutting' in capsys.readouterr().out
    [fast, slow] = (json.loads((tmp_path / name).read_text()) for name in ('check.json', 'slow.json'))
    assert min(check.ratios(slow)['test_cutting']) > max(check.ratios(fast)['test_cutting'])
    assert len(check.ratios(slow)['test_cutting']) == 5
    assert slow['machine_info']['like'] == 'tiny'


@pytest.mark.parametrize(
    ('was', 'now', 'slower'),
    [
        ([1.0, 1.1], [1.0, 1.1], False),
        ([1.0, 1.1], [1.15, 9.0], False),  # 4.5 % above the slowest
        ([1.0, 1.1], [1.16, 1.2], True),
        ([1.0, 1.1], [0.5], False),
        ([2.0], [2.11], True),  # one round each: the threshold alone
        ([1.0], [], True),  # it failed
    ],
)
def test_the_rule(was, now, slower):
    assert Comparison('case', was, now).regressed(0.05) is slower


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A baseline of this machine, and measurements that take no time; ``stored(ratios)`` sets these."""
    path = tmp_path / 'check.json'
    measured = {
        'machine_info': {'like': 'tiny', **facts()},
        'benchmarks': [{'name': 'test_stage', 'extra_info': {'ratios': [1.0, 1.1]}}],
    }
    path.write_text(json.dumps(measured))

    def measure(ratios):
        now = copy.deepcopy(measured)
        now['benchmarks'][0]['extra_info']['ratios'] = ratios
        monkeypatch.setattr(check, 'measure', lambda arguments: now)
        return path

    return measure


def test_measured_numbers(stored, capsys):
    path = str(stored([1.0, 1.2]))
    assert check.main(['--baseline', path, '--like', 'tiny']) == 0
    stored([1.32, 1.4])
    assert check.main(['--baseline', path, '--like', 'tiny']) == 1
    assert 'test_stage (+20.0%)' in capsys.readouterr().out
    assert check.main(['--baseline', path, '--like', 'tiny', '--threshold', '0.25']) == 0
    assert check.main(['--baseline', path, '--like', 'tiny', '--update']) == 0
    assert check.ratios(json.loads(Path(path).read_text())) == {'test_stage': [1.32, 1.4]}


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'torch': '0.1'}, 'torch 0.1, not '),
        ({'device': 'NVIDIA X', 'cores': 99}, 'device NVIDIA X, not '),
        ({'like': '300M'}, 'like 300M, not tiny'),
        (None, 'There is no baseline for '),
        ('[]', 'holds no results'),
        ('{', 'cannot be read'),
    ],
)
def test_what_cannot_be_compared_with_is_refused(stored, monkeypatch, capsys, changes, said):
    path = stored([1.0])
    monkeypatch.setattr(check, 'measure', lambda arguments: pytest.fail('measured in vain'))
    if changes is None:
        path.unlink()
    elif isinstance(changes, str):
        path.write_text(changes)
    else:
        content = json.loads(path.read_text())
        content['machine_info'] |= changes
        path.write_text(json.dumps(content))
    assert check.main(['--baseline', str(path), '--like', 'tiny']) == 2
    error = capsys.readouterr().err
    assert said in error
    assert ('--update' in error) == (not isinstance(changes, str))


def test_cases_that_are_new_or_gone(stored, capsys):
    path = stored([1.0])
    path.write_text(path.read_text().replace('test_stage', 'test_gone'))
    assert check.main(['--baseline', str(path), '--like', 'tiny']) == 2
    said = capsys.readouterr()
    assert 'test_stage is new' in said.out and 'has none of these cases' in said.err


# --- first-token throughput ------------------------------------------------------------------------------------------


def first_token(**changes):
    """Results of ``lmdeploy-vico bench``: four rounds of two cells, three quarters of the tokens twice as fast."""
    cells = [
        {'mode': 'llm', 'server': 'none', 'text_tokens': 64, 'token_compression': removed, 'completed': 1000}
        | {'failed': 0, 'error': None, 'round_durations': rounds}
        for removed, rounds in ((0.0, [10.0, 10.2, 10.1, 10.0]), (0.75, [5.0, 5.1, 5.2, 5.0]))
    ]
    arguments = {'num_prompts': 1000, 'max_concurrency': 32, 'tiles': 10, 'images': None, 'seed': 0}
    environment = {'device': 'NVIDIA X', 'torch': '2.12.1', 'commit': 'abc'}
    content = {'benchmark': 'first_token', 'complete': True, 'model': '/models/8B', 'arguments': arguments}
    return content | {'environment': environment, 'cells': cells} | changes


@pytest.fixture
def compare(tmp_path):
    """``compare(new)``: the exit status for these results against :func:`first_token`."""

    def run(new, *options):
        for name, content in (('old', first_token()), ('new', new)):
            (tmp_path / name).write_text(json.dumps(content))
        return check.main(['--first-token', str(tmp_path / 'new'), '--against', str(tmp_path / 'old'), *options])

    return run


def test_first_token_results_by_cell(compare, capsys):
    new = first_token()
    assert compare(new) == 0
    assert 'None of 3 got slower' in capsys.readouterr().out  # throughput of two cells, speed-up of one

    new['cells'][1]['round_durations'] = [5.8, 6.0, 5.9, 5.8]
    assert compare(new) == 1
    said = capsys.readouterr().out
    assert '2 of 3 got slower' in said and '75%: s/request (+11.5%)' in said and '75%: 1/speed-up' in said
    assert compare(new, '--threshold', '0.2') == 0

    new = first_token()
    new['cells'][0]['round_durations'] = [taken / 2 for taken in new['cells'][0]['round_durations']]
    assert compare(new) == 1  # what is not compressed got faster: the speed-up is gone, the throughput is not
    assert '1 of 3 got slower' in capsys.readouterr().out


def test_a_cell_that_fails_now(compare, capsys):
    new = first_token()
    new['cells'][1] |= {'completed': 0, 'error': 'the engine ended', 'round_durations': []}
    assert compare(new) == 1
    assert '75%: s/request (failed)' in capsys.readouterr().out


def test_first_token_results_of_other_versions_or_experiments(compare, capsys):
    environment = first_token()['environment']
    assert compare(first_token(environment=environment | {'torch': '2.13', 'commit': 'def'})) == 0
    assert 'measured with torch 2.12.1, not 2.13.' in capsys.readouterr().out
    assert compare(first_token(environment=environment | {'device': 'NVIDIA Y'})) == 2
    assert 'different experiments; the old one has device NVIDIA X, not NVIDIA Y' in capsys.readouterr().err
    assert compare(first_token(model='/elsewhere/8B')) == 0
    assert compare(first_token(model='/models/38B')) == 2
    assert compare(first_token(complete=False)) == 2
    assert 'new file holds no complete results' in capsys.readouterr().err


# --- the workflow ----------------------------------------------------------------------------------------------------


def commands(workflow):
    """The words of every command line in a workflow."""
    for job in workflow['jobs'].values():
        for step in job['steps']:
            yield from map(shlex.split, step.get('run', '').splitlines())


def test_the_workflow_names_what_there_is():
    workflow = yaml.safe_load((ROOT / 'docs' / 'ci-performance.yml').read_text())
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    seen = set()
    for program, *words in commands(workflow):
        if program == 'make':
            target, *variables = words
            assert target in targets
            seen.add(target)
            if target == 'bench-check':
                check.parse(shlex.split(variables[0].removeprefix('ARGS=')))
        elif program.endswith('lmdeploy-vico'):
            cli._parser().parse_args(words)
            seen.add(words[0])
    assert seen == {'setup', 'counters', 'bench-check', 'tiny', 'bench'}
    assert 'pull_request' in workflow['jobs']['times']['if']
    assert workflow['jobs']['times']['runs-on'] == ['self-hosted', 'gpu']
