"""``python -m benchmarks on-gpu``: its options, its limits, what it runs. ``VICO_TEST_DEVICE=cpu`` tries its parts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG

from benchmarks.gates import budget, estimates, parts
from benchmarks.vision import vit_speed

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'benchmarks' / 'on_gpu.sh'
PARTS = [part.name for part in parts.PARTS]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ['bash', str(SCRIPT), *arguments]
    return subprocess.run(command, env=settings(environment), capture_output=True, text=True, timeout=300, check=False)


def settings(environment: dict[str, str]) -> dict[str, str]:
    without = {name: value for name, value in os.environ.items() if name not in ('PROMPTS', 'LIMIT', 'SERVER')}
    return {**without, 'PYTHON': sys.executable, **environment}


@pytest.fixture
def interpreter(tmp_path):
    """``interpreter(case, ...)``: a Python for which a case of the shell's says what becomes of certain arguments."""

    def make(*cases: str) -> str:
        file = tmp_path / 'python'
        file.write_text(
            f'#!/bin/bash\ncase "$*" in\n*"benchmarks on-gpu"*) exec {sys.executable} "$@";;\n'
            + ''.join(f'{case};;\n' for case in cases)
            + f'*) exec {sys.executable} "$@";;\nesac\n'
        )
        file.chmod(0o755)
        return str(file)

    return make


# What this machine is to the script: a GPU with so many GiB and the plugin installed.
def gpu(memory: int = 139) -> tuple[str, str]:
    return f'"-c import re"*) echo h200 {memory}', '*"cli env"*) echo "plugin         active"'


def test_help_names_every_part():
    shown = run('--help')
    assert shown.returncode == 0
    for part in PARTS:
        assert re.search(rf'^  (.*, )?{part}(,.*|  .*)?$', shown.stdout, re.MULTILINE), part


@pytest.mark.parametrize('arguments', [('nonsense',), ('kernels', '--quick'), ('-o',)])
def test_wrong_arguments_run_nothing(arguments, tmp_path):
    refused = run(*arguments)
    assert refused.returncode != 0
    assert '==>' not in refused.stdout
    assert refused.stderr


def test_without_a_device_it_says_how_to_try(tmp_path):
    hidden = {'VICO_TEST_DEVICE': 'cuda', 'CUDA_VISIBLE_DEVICES': ''}
    refused = run('-o', str(tmp_path / 'new'), 'kernels', **hidden)
    assert refused.returncode == 2
    assert 'VICO_TEST_DEVICE=cpu tries the commands' in refused.stderr
    assert not (tmp_path / 'new').exists()


def test_without_the_plugin_nothing_is_measured(tmp_path):
    refused = run('-o', str(tmp_path / 'new'), 'kernels', VICO_TEST_DEVICE='cpu', LMDEPLOY_VICO='0')
    assert refused.returncode == 2
    assert 'the plugin is not active' in refused.stderr and 'inactive: LMDEPLOY_VICO=0' in refused.stderr
    assert not (tmp_path / 'new').exists()


@pytest.mark.slow
def test_a_part_runs_and_the_targets_follow(tmp_path):
    tried = run('-o', str(tmp_path / 'new'), 'memcheck', VICO_TEST_DEVICE='cpu')
    assert tried.returncode == 0, tried.stderr
    assert '==> memory checker: skipped' in tried.stdout
    assert '8B, images, 50% removed' in tried.stdout
    assert '==> all done in ' in tried.stdout
    [log] = (tmp_path / 'new').glob('*-cpu-memcheck.log')
    assert 'memory checker: skipped' in log.read_text()


@pytest.mark.long
@pytest.mark.slow
def test_a_step_that_fails_is_in_the_exit_status(tmp_path, interpreter):
    python = interpreter('*"benchmarks soak"*) echo what went wrong >&2; exit 3')
    tried = run('-o', str(tmp_path), 'soak', 'memcheck', VICO_TEST_DEVICE='cpu', PYTHON=python)
    assert tried.returncode == 1
    assert '==> soak: FAILED after' in tried.stdout
    assert tried.stdout.index('memory checker: skipped') > tried.stdout.index('FAILED')
    assert tried.stdout.endswith('==> failed: soak\n')
    [log] = tmp_path.glob('*-cpu-on-gpu.log')
    assert 'what went wrong' in log.read_text()


# A measurement without end, which writes what it has when it is interrupted.
ENDLESS = """
import pathlib, sys, time
try:
    print('begun', flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1]).write_text('half')
    sys.exit(1)
"""


@pytest.fixture
def endless(tmp_path, interpreter):
    (tmp_path / 'endless.py').write_text(ENDLESS)
    return interpreter(f'*"benchmarks soak"*) exec {sys.executable} {tmp_path}/endless.py "${{@: -1}}"')


@pytest.mark.long
@pytest.mark.slow
def test_a_part_that_is_cut_off_keeps_what_it_has(tmp_path, endless):
    tried = run('-o', str(tmp_path), 'soak', 'memcheck', VICO_TEST_DEVICE='cpu', PYTHON=endless, LIMIT='1')
    assert tried.returncode == 1
    assert 'begun' in tried.stdout and '==> soak: CUT OFF after' in tried.stdout
    assert 'memory checker: skipped' in tried.stdout, 'other parts have limits of their own'
    [result], [log] = tmp_path.glob('*-soak.json'), tmp_path.glob('*.log')
    assert result.read_text() == 'half' and 'begun' in log.read_text()


@pytest.mark.long
@pytest.mark.slow
def test_told_to_end_it_keeps_what_it_has(tmp_path, endless):
    command = ['bash', str(SCRIPT), '-o', str(tmp_path), 'soak', 'memcheck']
    environment = settings({'VICO_TEST_DEVICE': 'cpu', 'PYTHON': endless, 'TMPDIR': str(tmp_path)})
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as script:
        read = ''
        while 'begun' not in read:
            line = script.stdout.readline()
            assert line, read
            read += line
        script.terminate()
        rest = script.stdout.read()
    assert script.returncode == 143
    assert 'memcheck was not begun' in rest
    [result] = tmp_path.glob('*-soak.json')
    assert result.read_text() == 'half'
    assert list(tmp_path.glob('vico-on-gpu-*')) == [], 'nothing is left of the scratch folder'


@pytest.mark.parametrize('part', ['checks-turbomind', 'turbomind-8B-64', 'turbomind-8B-512'])
def test_turbomind_has_no_trial_without_a_device(part, tmp_path):
    setup = parts.Setup(sys.executable, cuda=False, scratch=tmp_path, prefix='x', prompts=6)
    [step] = parts.find(part).steps(setup)
    assert step.skipped == 'TurboMind needs a CUDA device' and not step.command


@pytest.fixture
def recorded(tmp_path, interpreter):
    """``recorded(memory, part, ..., variables)``: what was printed, and the commands that were run, with variables."""

    def on_a_gpu(memory: int, *parts: str, **variables: str) -> tuple[str, list[str]]:
        python = interpreter(
            *gpu(memory),
            '*) echo "RUN device=$VICO_TEST_DEVICE dummy=$LMDEPLOY_VICO_DUMMY_WEIGHTS $*" >>"$RECORD"\n'
            'case "$*" in *" tiny "*) mkdir -p "$4"; touch "$4/config.json";; esac',
        )
        record = tmp_path / 'record'
        variables |= {'PYTHON': python, 'TMPDIR': str(tmp_path), 'RECORD': str(record), 'VICO_TEST_DEVICE': 'cuda'}
        tried = run('-o', str(tmp_path / 'new'), *parts, **variables)
        assert tried.returncode == 0, tried.stdout + tried.stderr
        assert list(tmp_path.glob('vico-on-gpu-*')) == [], 'nothing is left of the scratch folder'
        return tried.stdout, record.read_text().splitlines()

    return on_a_gpu


@pytest.mark.slow
def test_what_a_gpu_would_run(recorded):
    printed, ran = recorded(139, PROMPTS='96', SERVER='--tp 2')
    made = [line.partition(' tiny ')[2].partition('/')[2].split('/')[-1] for line in ran if ' tiny ' in line]
    sized = [f'{name} --like {name}' for name in ('8B', '30B-A3B', '38B')]
    written = '8B--weights --like 8B --weights'
    assert made == [*sized, *[written] * 2, '1B--weights --like 1B --weights', *[written] * 2]
    bench = {
        line.partition('--plot ')[2].split()[0].partition('h200-')[2]: line for line in ran if ' first-token ' in line
    }
    cells = [f'llm-{name}-{text}.png' for name in ('8B', '30B-A3B', '38B') for text in (64, 512)]
    baselines = ['baselines-8B-flash.png', 'baselines-8B-internvl.png']
    assert list(bench) == [*cells, 'image-8B.png', *baselines, 'turbomind-8B-64.png', 'turbomind-8B-512.png']
    for what, line in bench.items():
        assert ('dummy=1 ' in line) == (not what.startswith(('baselines', 'turbomind'))), line
        assert '--num-prompts 96 --max-concurrency 32 --tiles 10 ' in line
        assert line.endswith(' -- --tp 2')
        assert '--log-level' not in line
    assert '--text-tokens 512 --token-compression 0 0.25 0.5 0.75' in bench['llm-8B-512.png']
    assert '--baseline lmdeploy-flash --servers in-turn' in bench['baselines-8B-flash.png']
    both = '--language-engine pytorch turbomind --servers in-turn'
    assert f'--text-tokens 512 --token-compression 0 0.25 0.5 0.75 {both}' in bench['turbomind-8B-512.png']
    expected = ('tests/kernels', 'tests/gpu -k not engine', 'engine and moe', '--like 6B', '--width 3200')
    expected += ('benchmarks share --like 241B --tp 8 --output ',)
    expected += (
        'benchmarks vit-speed --like 300M --device cuda --output ',
        f'benchmarks handover --rounds {estimates.HANDOVERS} --output ',
    )
    expected += ('tests/gpu/test_turbomind.py', 'benchmarks placement', '--requests 2000', 'benchmarks check --update')
    places = [next(index for index, line in enumerate(ran) if words in line) for words in expected]
    assert places[:4] == sorted(places[:4]) and places[3] < min(places[5:]), 'what is right comes first'
    assert all(line.startswith('RUN device=cuda ') for line in ran)
    for part in PARTS:
        [shown] = re.findall(
            rf'^==> {part}: at most (\d+) s by these estimates, 60 s in reserve, of 600', printed, re.M
        )
        assert int(shown) <= 540


def test_an_h100_is_told_that_38b_does_not_fit(recorded):
    printed, ran = recorded(79, 'llm-38B-64', 'llm-30B-A3B-64')
    assert '==> llm-38B-64: SKIPPED. 38B needs 82 GiB, 74 of them for its weights; this device has 79 GiB.' in printed
    assert [line for line in ran if ' first-token ' in line and '30B-A3B' in line]
    assert not [line for line in ran if '38B' in line]


def test_a_share_fits_where_it_fits():
    part = parts.find('share-241B')
    assert budget.plan(part, budget.LIMIT, estimates.MANY, memory=79).requests, 'an H100'
    [line] = budget.plan(part, budget.LIMIT, estimates.MANY, memory=63).lines
    assert line.endswith(
        'SKIPPED. The share of one of 8 ranks of the 241B needs 65 GiB, 57 of them for its weights; '
        'this device has 63 GiB.'
    )


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('part', parts.PARTS, ids=PARTS)
def test_every_part_fits_ten_minutes(part):
    made = budget.plan(part, budget.LIMIT, estimates.MANY, memory=139)
    *items, total = made.lines
    rows = [re.match(r' *(\d+) x +([\d.]+) s = +(\d+) s  \w', item).groups() for item in items]
    added = sum(int(seconds) for _, _, seconds in rows)
    said = int(re.search(r'at most (\d+) s', total)[1])
    assert abs(said - added) <= len(rows) and said + budget.RESERVE <= budget.LIMIT
    assert budget.FEWEST <= made.requests <= estimates.MANY


def collected(arguments: tuple[str, ...]) -> list[str]:
    """The tests that pytest would run, with the Triton kernels for which a GPU is made up."""
    command = [sys.executable, '-m', 'pytest', '--collect-only', '-q', *arguments]
    variables = {**os.environ, 'TRITON_INTERPRET': '1', 'VICO_TEST_DEVICE': 'cpu'}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if '::' in line]


def count(items: list[estimates.Item], what: str) -> float:
    [item] = [item for item in items if item.what.startswith(what)]
    return item.count


@pytest.mark.slow
def test_kernel_tests_are_as_many_as_the_arithmetic_says():
    tests = collected(parts.KERNEL_TESTS)
    assert not [test for test in tests if 'test_compiled' in test], 'compiled ahead of time, which needs no GPU'
    triton = [test for test in tests if 'triton' in test and 'bad_argument' not in test]
    drawn = [test for test in triton if 'random' in test]
    items = estimates.checks_kernels()
    assert drawn and 0 < len(triton) - len(drawn) <= count(items, 'a test of a Triton kernel')
    assert len(drawn) <= count(items, 'random sizes')
    assert len(tests) - len(triton) <= count(items, 'a test that compiles nothing')
    assert 0 < len(collected(parts.MEMCHECK_TESTS)) <= count(estimates.memcheck(), 'a test')


def test_the_arithmetic_is_that_of_the_measurements():
    for vit in ('300M', '6B'):
        assert sum(item.seconds for item in estimates.vit_speed(vit)[1:]) == vit_speed.plan(vit, 'cuda', 5.0)[0]
    *_, processes, sent = estimates.handover()
    assert processes.what.startswith('two processes of each of 6 ways') and processes.count == 9
    assert sent.count == 9 * 6 * (1 + 25 + 4 * 8)


def test_requests_are_as_many_as_fit():
    todo = [estimates.Item('start', 100.0), estimates.Item('each', 0.5, None)]
    assert budget.requests(todo, 600, 2000) == (600 - budget.RESERVE - 100) * 2 // 32 * 32
    assert budget.requests(todo, 600, 96) == 96
    assert budget.requests(todo, 100, 2000) == 0


def test_a_part_that_cannot_fit_is_not_begun():
    made = budget.plan(parts.find('llm-38B-512'), 300, estimates.MANY, memory=139)
    *_, total, last = made.lines
    assert made.refused and not made.requests
    assert last == '==> llm-38B-512: REFUSED, there is too little time.'
    assert int(re.search(r'at most (\d+) s', total)[1]) > 300 - budget.RESERVE


def test_unknown_parts_are_named(capsys):
    with pytest.raises(SystemExit):
        budget.main(['soak', 'nonsense'])
    assert 'there is no part nonsense' in capsys.readouterr().err
