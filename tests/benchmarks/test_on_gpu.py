"""``benchmarks/on_gpu.sh``: its options. Its parts are tried with ``VICO_TEST_DEVICE=cpu``, in minutes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / 'benchmarks' / 'on_gpu.sh'


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, 'PYTHON': sys.executable, **environment}
    command = ['bash', str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_help_names_every_part():
    shown = run('--help')
    assert shown.returncode == 0
    [parts] = [line for line in SCRIPT.read_text().splitlines() if line.startswith('parts=(')]
    for part in parts.removeprefix('parts=(').removesuffix(')').split():
        assert f'  {part}' in shown.stdout.replace(', ', '\n  ')


@pytest.mark.parametrize('arguments', [('nonsense',), ('kernels', '--quick'), ('-o',)])
def test_wrong_arguments_run_nothing(arguments, tmp_path):
    refused = run(*arguments)
    assert refused.returncode != 0
    assert '==>' not in refused.stdout
    assert refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a CUDA device')
def test_without_a_device_it_says_how_to_try(tmp_path):
    refused = run('-o', str(tmp_path / 'new'), 'kernels', VICO_TEST_DEVICE='cuda')
    assert refused.returncode == 2
    assert 'VICO_TEST_DEVICE=cpu tries the script' in refused.stderr
    assert not (tmp_path / 'new').exists()


def test_a_part_runs_and_the_targets_follow(tmp_path):
    tried = run('-o', str(tmp_path / 'new'), 'memcheck', VICO_TEST_DEVICE='cpu')
    assert tried.returncode == 0, tried.stderr
    assert '==> memory checker: skipped' in tried.stdout
    assert '8B, images, 50% removed' in tried.stdout
    assert '==> all done in ' in tried.stdout
    assert (tmp_path / 'new').is_dir()


def test_a_step_that_fails_is_in_the_exit_status(tmp_path):
    (tmp_path / 'python').write_text(f'#!/bin/sh\ncase "$*" in *soak*) exit 3;; esac\nexec {sys.executable} "$@"\n')
    (tmp_path / 'python').chmod(0o755)
    tried = run('-o', str(tmp_path), 'soak', 'memcheck', VICO_TEST_DEVICE='cpu', PYTHON=str(tmp_path / 'python'))
    assert tried.returncode == 1
    assert '==> soak: FAILED after' in tried.stdout
    assert tried.stdout.index('memory checker: skipped') > tried.stdout.index('FAILED')
    assert tried.stdout.endswith('==> failed: soak\n')


def test_what_a_gpu_would_run(tmp_path):
    """With an interpreter that says its arguments and does nothing."""
    (tmp_path / 'python').write_text(
        '#!/bin/sh\n'
        'case "$1" in -c) echo h200; exit;; esac\n'
        'echo "RUN dummy=$LMDEPLOY_VICO_DUMMY_WEIGHTS $*" >&2\n'
        'case "$*" in *" tiny "*) mkdir -p "$4"; touch "$4/config.json";; esac\n'
    )
    (tmp_path / 'python').chmod(0o755)
    settings = {'PYTHON': str(tmp_path / 'python'), 'TMPDIR': str(tmp_path), 'SERVER': '--tp 2'}
    tried = run('-o', str(tmp_path / 'new'), VICO_TEST_DEVICE='cuda', PROMPTS='96', TEXT_TOKENS='64', **settings)
    assert tried.returncode == 0, tried.stderr
    ran = [line.removeprefix('RUN ') for line in tried.stderr.splitlines() if line.startswith('RUN ')]
    made = [line.partition(' tiny ')[2].partition('/')[2].split('/')[-1] for line in ran if ' tiny ' in line]
    assert made == [f'{name} --like {name}' for name in ('8B', '30B-A3B', '38B')] + ['8B--weights --like 8B --weights']
    bench = {line.partition('--plot ')[2].split()[0].partition('h200-')[2]: line for line in ran if ' bench ' in line}
    assert list(bench) == ['llm-8B-64.png', 'llm-30B-A3B-64.png', 'llm-38B-64.png', 'image-8B.png', 'baselines-8B.png']
    for what, line in bench.items():
        assert line.startswith('dummy=1 ') == (what != 'baselines-8B.png'), line
        assert '--num-prompts 96 --max-concurrency 32 --tiles 10 ' in line
        assert line.endswith(' -- --tp 2')
    assert '--mode llm ' in bench['llm-8B-64.png'] and '--token-compression 0 0.25 0.5 0.75' in bench['llm-8B-64.png']
    assert '--baseline lmdeploy-flash lmdeploy-internvl' in bench['baselines-8B.png']
    for expected in ('--like 6B', '--width 3200', 'benchmarks.handover', 'benchmarks.placement', '--requests 2000'):
        assert any(expected in line for line in ran), expected
    assert list(tmp_path.glob('tmp.*')) == [], 'nothing is left of the scratch folder'
