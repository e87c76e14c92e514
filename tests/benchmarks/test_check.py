"""``benchmarks/gates/check.py``: a slowed build fails, an unchanged one passes, and a wrong baseline is refused."""

import json
import re
import shlex
import sys
from pathlib import Path

import counting_clock
import pytest
import torch
import yaml

from benchmarks.gates import check
from benchmarks.lib.compare import rounds_that_count
from lmdeploy_vico import cli
from lmdeploy_vico.vision import tile_encoder, tiling
from lmdeploy_vico.vision.model.tower import VisionTower
from lmdeploy_vico.vision.projection import Projection

ROOT = Path(__file__).parents[2]
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason='a tiny ViT takes no time of a GPU')
SECONDS = 5.0  # many times what the counting clock shows for a whole case
SETTINGS = ('--like', 'tiny', '--turns', '2', '--neighbours', '1000', '--threshold', '0.25')


@pytest.fixture(scope='module', autouse=True)
def undisturbed():
    """Seconds are counted function calls: whatever else this machine does makes nothing faster or slower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTEST_ADDOPTS', '--benchmark-timer=counting_clock.read')
        yield
    sys.setprofile(None)


@pytest.fixture(scope='module')
def unchanged(tmp_path_factory):
    """The baseline of this build, with two cases."""
    path = tmp_path_factory.mktemp('baseline') / 'check.json'
    assert check.main(['--baseline', str(path), *SETTINGS, '--cases', 'cutting', 'encoding', '--update']) == 0
    return path


def slowed(function, seconds):
    """The same function, twice the work or so many seconds later."""

    def run(*arguments):
        if not seconds:
            function(*arguments)
        until = counting_clock.read() + seconds
        while counting_clock.read() < until:
            pass
        return function(*arguments)

    return run


@pytest.mark.parametrize(
    ('case', 'owner', 'name', 'seconds'),
    [
        ('test_cutting', tiling, 'cut_tiles', 0),
        pytest.param('test_encoding', VisionTower, 'encode', 0, marks=[ON_CPU, pytest.mark.long]),
        pytest.param('test_encoding', tile_encoder, 'route_prompt', SECONDS, marks=pytest.mark.long),
        pytest.param('test_encoding', Projection, 'by_image', SECONDS, marks=pytest.mark.long),
    ],
)
def test_a_slowed_build_fails(unchanged, tmp_path, monkeypatch, capsys, case, owner, name, seconds):
    monkeypatch.setattr(owner, name, slowed(getattr(owner, name), seconds))
    output = tmp_path / 'slow.json'
    assert check.main(['--baseline', str(unchanged), *SETTINGS, '--cases', case, '--output', str(output)]) == 1
    assert f'1 of 1 got slower by more than 25%: {case}' in capsys.readouterr().out
    fast, slow = (json.loads(path.read_text()) for path in (unchanged, output))
    [fast_rounds, slow_rounds] = (rounds_that_count(one, 1000)[0][case] for one in (fast, slow))
    assert min(slow_rounds) > max(fast_rounds)
    assert len(slow_rounds) == len(slow['benchmarks'][0]['extra_info']['neighbours']) == 5
    assert slow['machine_info']['like'] == 'tiny'


@pytest.mark.busy
def test_an_unchanged_build_passes(unchanged, capsys):
    assert check.main(['--baseline', str(unchanged), *SETTINGS, '--cases', 'cutting', 'encoding']) == 0
    assert 'None of 2 got slower' in capsys.readouterr().out


def results(**cases):
    """What is stored on this machine of cases, each given by its ratios and the cores that others used meanwhile."""
    benchmarks = [
        {'name': f'test_{name}', 'extra_info': {'ratios': ratios, 'neighbours': neighbours or [0.0] * len(ratios)}}
        for name, (ratios, neighbours) in cases.items()
    ]
    return {'machine_info': check.conditions('tiny'), 'benchmarks': benchmarks}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(*options, stage=(ratios, neighbours), ...)``: the exit status where these cases are measured at once."""

    def main(*options, **cases):
        monkeypatch.setattr(check, 'measure', lambda arguments: results(**cases))
        return check.main(['--baseline', str(tmp_path / 'check.json'), '--like', 'tiny', *options])

    return main


@pytest.fixture
def stored(tmp_path):
    """A baseline of this machine."""
    path = tmp_path / 'check.json'
    path.write_text(json.dumps(results(stage=([1.0, 1.1, 1.0], None))))
    return path


def test_measured_numbers(stored, run, capsys):
    assert run(stage=([1.0, 1.2, 1.1], None)) == 0
    slower = ([1.32, 1.4, 1.4], None)
    assert run(stage=slower) == 1
    assert 'test_stage (+20.0%)' in capsys.readouterr().out
    assert run('--threshold', '0.25', stage=slower) == 0


def test_what_is_replaced_is_compared_with_first(stored, run, capsys):
    assert run('--update', stage=([1.32, 1.4, 1.5], None)) == 0
    said = capsys.readouterr().out
    assert 'Against what is stored' in said and 'test_stage (+20.0%)' in said
    assert rounds_that_count(json.loads(stored.read_text()), 0.1)[0] == {'test_stage': [1.32, 1.4, 1.5]}

    stored.write_text(stored.read_text().replace('"torch": "', '"torch": "0.'))
    assert run('--update', stage=([1.0, 1.0, 1.0], None)) == 0
    said = capsys.readouterr().out
    assert 'cannot be compared with' in said and 'make bench-check' not in said
    stored.write_text('{')
    assert run('--update', stage=([1.0, 1.0, 1.0], None)) == 0


BUSY = [0.5, 0.9, 0.4, 0.0, 0.0]


def test_a_busy_machine_says_nothing(stored, run, capsys):
    slower = [1.5] * 5
    assert run(stage=(slower, BUSY)) == 2
    said = capsys.readouterr().out
    assert 'cannot be said whether 1 of 1 got slower' in said and 'test_stage (+36.4%)' in said
    assert run(stage=(slower, [0.5, 0.9, 0.0, 0.1, 0.0])) == 1  # three rounds were quiet
    assert run(stage=([0.9, 0.9, 1.5, 1.5, 1.5], [0.5, 0.9, 0.0, 0.1, 0.0])) == 1  # and these alone count
    assert run('--neighbours', '1', stage=(slower, BUSY)) == 1
    assert run(stage=([1.0] * 5, BUSY)) == 0  # not slower even so


def test_one_slower_case_is_enough_beside_disturbed_ones(stored, run, capsys):
    stored.write_text(json.dumps(results(stage=([1.0] * 3, None), cutting=([1.0] * 3, None))))
    assert run(stage=([1.5] * 5, BUSY), cutting=([1.5] * 3, None)) == 1
    said = capsys.readouterr().out
    assert '1 of 2 got slower by more than 5%: test_cutting' in said and 'cannot be said whether 1 of 2' in said


def test_a_busy_machine_stores_nothing(stored, run, capsys, tmp_path):
    before = stored.read_text()
    assert run('--update', '--output', str(tmp_path / 'new.json'), stage=([1.0] * 5, BUSY)) == 2
    assert 'Nothing is stored, as other processes used more than 0.1 cores' in capsys.readouterr().err
    assert stored.read_text() == before
    assert json.loads((tmp_path / 'new.json').read_text())['benchmarks'][0]['extra_info']['neighbours'] == BUSY


def test_storing_some_cases_loses_no_others(stored, run, capsys):
    before = stored.read_text()
    assert run('--update', '--cases', 'cutting', cutting=([1.0] * 3, None)) == 2
    assert 'also holds test_stage, which would be lost' in capsys.readouterr().err
    assert stored.read_text() == before
    assert run('--update', '--cases', 'STAGE', stage=([1.0] * 3, None)) == 0


@pytest.mark.parametrize('option', ['--baseline', '--output'])
def test_where_nothing_can_be_written_nothing_is_measured(stored, monkeypatch, capsys, option):
    monkeypatch.setattr(check, 'measure', lambda arguments: pytest.fail('measured in vain'))
    options = ['--baseline', str(stored), '--like', 'tiny', '--update', option, '/nonexistent/x.json']
    assert check.main(options) == 2
    assert capsys.readouterr().err == 'bench-check: /nonexistent/x.json cannot be written: No such file or directory.\n'


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'torch': '0.1'}, 'torch 0.1, not '),
        ({'device': 'NVIDIA X', 'cores': 99}, 'device NVIDIA X, not '),
        ({'like': '300M'}, 'like 300M, not tiny'),
        ({'recipe': None}, 'recipe None, not '),  # from before recipes had a number
        ({'omp_wait_policy': 'ACTIVE'}, 'omp_wait_policy ACTIVE, not '),
        (None, 'There is no baseline for '),
        ('[]', 'holds no results'),
        ('{', 'cannot be read'),
    ],
)
def test_what_cannot_be_compared_with_is_refused(stored, monkeypatch, capsys, changes, said):
    path = stored
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


def test_cases_that_are_new_or_gone(stored, run, capsys):
    assert run(stage=([1.0] * 3, None), cutting=([1.0] * 3, None)) == 0
    assert 'test_cutting is new' in capsys.readouterr().out
    stored.write_text(json.dumps(results(stage=([1.0] * 3, None), gone=([1.0] * 3, None))))
    assert run(stage=([1.0] * 3, None)) == 2
    said = capsys.readouterr().out
    assert 'Stored, but not measured: test_gone.' in said and 'None of 1 got slower' in said
    assert run(stage=([1.5] * 3, None)) == 1
    assert run('--cases', 'stage', stage=([1.0] * 3, None)) == 0
    assert run(other=([1.0] * 3, None)) == 2
    said = capsys.readouterr()
    assert 'not measured: test_stage, test_gone.' in said.out and 'has none of these cases' in said.err


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
            cli.parser().parse_args(words)
            seen.add(words[0])
    assert seen == {'setup', 'counters', 'bench-check', 'tiny', 'bench'}
    assert 'pull_request' in workflow['jobs']['times']['if']
    times = workflow['jobs']['times']
    assert times['runs-on'] == ['self-hosted', 'gpu']
    assert times['steps'][0]['with'] == {'clean': False}  # or .venv would be made again with every push
    removed = {path for program, *paths in commands(workflow) if program == 'rm' for path in paths}
    assert removed >= set(times['steps'][-1]['with']['path'].split())  # and nothing of an earlier run is taken for new
