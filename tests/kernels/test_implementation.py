"""Which implementation is chosen, and what the kernels may import."""

import ast
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmdeploy_vico.kernels import implementation

KERNELS = Path(__file__).parents[2] / 'kernels'

# Whether Triton's interpreter is there is read once in a process, so each environment needs one of its own.
RESOLVE = """
import json, sys, torch
from lmdeploy_vico.kernels import implementation

torch.cuda.get_device_capability = lambda device=None: tuple(map(int, sys.argv[1].split('.')))

def resolve(choice, device):
    implementation.use(choice)
    try:
        return implementation.implementation(torch.device(device))
    except RuntimeError as error:
        return f'{type(error).__name__}: {error}'

print(json.dumps({choice: {device: resolve(choice, device) for device in ('cpu', 'cuda', 'meta')}
                  for choice in ('auto', 'torch', 'triton')}))
"""


def resolve(capability: str = '8.0', **environment: str) -> dict[str, dict[str, str]]:
    """What runs in a new process, by choice and device, where CUDA devices have this compute capability."""
    command = [sys.executable, '-c', RESOLVE, capability]
    inherited = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    run = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope='module')
def compiled():
    return resolve()


@pytest.fixture(scope='module')
def old_device():
    return resolve('7.5')


@pytest.fixture(scope='module')
def interpreted():
    return resolve(TRITON_INTERPRET='1')


def test_auto_is_triton_where_its_kernels_run(compiled, old_device, interpreted):
    assert compiled['auto'] == {'cpu': 'torch', 'cuda': 'triton', 'meta': 'torch'}
    assert old_device['auto'] == {'cpu': 'torch', 'cuda': 'torch', 'meta': 'torch'}
    assert interpreted['auto'] == {'cpu': 'triton', 'cuda': 'torch', 'meta': 'torch'}


def test_torch_runs_everywhere(compiled, old_device, interpreted):
    for resolved in (compiled, old_device, interpreted):
        assert resolved['torch'] == {'cpu': 'torch', 'cuda': 'torch', 'meta': 'torch'}


def test_triton_is_refused_where_it_cannot_run(compiled, old_device, interpreted):
    assert compiled['triton']['cuda'] == 'triton'
    assert interpreted['triton']['cpu'] == 'triton'
    for refused, reason in (
        (compiled['triton']['cpu'], 'TRITON_INTERPRET=1'),
        (interpreted['triton']['cuda'], 'TRITON_INTERPRET=1'),
        (old_device['triton']['cuda'], '7.5'),
        (compiled['triton']['meta'], 'meta'),
        (interpreted['triton']['meta'], 'TRITON_INTERPRET=1'),
    ):
        assert refused.startswith('RuntimeError: ')
        assert reason in refused


def test_use_is_remembered():
    for choice in ('torch', 'triton', 'auto'):
        implementation.use(choice)
        assert implementation.requested() == choice


@pytest.mark.parametrize('choice', ['cuda', 'Triton', '', None])
def test_an_unknown_choice_changes_nothing(choice):
    implementation.use('torch')
    with pytest.raises(ValueError, match='auto, triton, torch'):
        implementation.use(choice)
    assert implementation.requested() == 'torch'


def test_the_choice_is_logged_once_for_each_device(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('lmdeploy_vico'), 'propagate', True)  # a server's start turns it off
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (9, 0))
    implementation._resolve.cache_clear()
    implementation.use('torch')
    with caplog.at_level(logging.INFO, logger='lmdeploy_vico'):
        for device in ('cpu', 'cpu', 'cuda:0', 'cuda:1', 'cuda:0', 'cpu', 'meta'):
            implementation.implementation(torch.device(device))
    implementation._resolve.cache_clear()  # of what it was made to believe
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    for message, device in zip(messages, ('cpu', 'cuda:0', 'cuda:1', 'meta'), strict=True):
        assert device in message
        assert 'torch' in message


def test_kernels_know_nothing_above_them():
    def allowed(name: str) -> bool:
        below = {'torch', 'triton', *sys.stdlib_module_names}
        return name.split('.')[0] in below or f'{name}.'.startswith('lmdeploy_vico.kernels.')

    files = list(KERNELS.glob('**/*.py'))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = ['.' * node.level + (node.module or '')]
            for name in names:
                assert allowed(name), f'{file.name} imports {name}'
