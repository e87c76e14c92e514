"""What the CPU backend changes in LMDeploy, and when."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from waiting import HANG

from lmdeploy_vico.cpu import memory, patches, selection
from lmdeploy_vico.launch import ApiServer


def run(code: str, **environment: str) -> str:
    """Run Python code in a process of its own and return what it printed."""
    result = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


OBSERVE = """
import json, sys
import {first}
import torch

def snapshot():
    names = {{f'cuda.{{n}}': v for n, v in vars(torch.cuda).items() if type(v) is not type(sys)}}
    names |= {{n: v for n, v in vars(torch).items() if callable(v)}}
    names |= {{f'Tensor.{{n}}': v for n, v in vars(torch.Tensor).items()}}
    return {{n: id(v) for n, v in names.items()}}

before = snapshot()
import lmdeploy.cli.serve, lmdeploy.utils, lmdeploy.vl.engine, lmdeploy.pytorch.config
import lmdeploy.pytorch.engine.engine, lmdeploy.pytorch.engine.executor.mp_executor
import lmdeploy.pytorch.engine.config_builder as builder
after = snapshot()
batch_sizes = [m.get_max_batch_size for m in (lmdeploy.cli.serve, lmdeploy.utils, builder)]
bf16 = [m.is_bf16_supported for m in (lmdeploy.utils, lmdeploy.vl.engine, lmdeploy.pytorch.config)]
wanted = {wanted}
print(json.dumps({{
    'changed': sorted(n for n in before if before[n] != after.get(n)),
    'views': [n for n, m in sys.modules.items() if type(vars(m).get('torch')).__name__ == 'TorchView'],
    'engine': 'lmdeploy_vico.cpu.engine' in sys.modules,
    'batch sizes': [[ask('cuda'), ask('ascend')] for ask in batch_sizes] if wanted else None,
    'bf16': [[ask('cuda'), ask()] for ask in bf16] if wanted else None,
}}))
"""


@pytest.fixture(scope='module')
def untouched() -> dict:
    """What importing LMDeploy without the plugin does to PyTorch, which wraps a function of its own on the way."""
    return json.loads(run(OBSERVE.format(first='torch', wanted=False), LMDEPLOY_VICO='0'))


@pytest.mark.parametrize('first', ['torch', 'lmdeploy'])
def test_importing_answers_questions_and_changes_nothing_in_torch(first, untouched):
    seen = json.loads(run(OBSERVE.format(first=first, wanted=True), LMDEPLOY_VICO='cpu'))
    assert seen['changed'] == untouched['changed']
    assert seen['views'] == []
    assert not seen['engine']
    assert seen['batch sizes'] == [[patches.MAX_BATCH_SIZE, 256]] * 3
    assert seen['bf16'] == [[True, True]] * 3


def test_other_accelerators_are_left_alone(monkeypatch):
    assert selection.runs_on_cpu('cuda') == (not selection.has_cuda())
    assert not selection.runs_on_cpu('ascend')
    monkeypatch.setattr(selection, 'has_cuda', lambda: True)
    assert not selection.runs_on_cpu('cuda')


def test_cache_memory_is_small_and_shared(monkeypatch):
    monkeypatch.setattr(memory, 'available_memory', lambda: 1000 * memory.GIB)
    assert memory.cache_budget() == memory.CACHE_LIMIT
    monkeypatch.setattr(memory, 'available_memory', lambda: 2 * memory.GIB)
    assert memory.cache_budget() == memory.GIB // 2
    monkeypatch.setattr(memory, '_ranks', 2)
    assert memory.cache_budget() == memory.GIB // 4


@pytest.mark.server
def test_api_server_starts_and_answers(dense_checkpoint, tmp_path):
    """The unmodified command, with no option but the address; the backend is announced once."""
    with ApiServer(dense_checkpoint, log=tmp_path / 'log', timeout=HANG) as server:
        usage = ask(server, dense_checkpoint, 'hello')
        log = server.log_text()
    assert usage['completion_tokens'] == 4
    assert log.count(selection.MESSAGE) == 1


def ask(server: ApiServer, checkpoint: Path, content: str) -> dict:
    """Post one chat request and return its usage."""
    body = {'model': str(checkpoint), 'max_tokens': 4, 'temperature': 0, 'ignore_eos': True}
    body['messages'] = [{'role': 'user', 'content': content}]
    request = urllib.request.Request(
        f'{server.url}/v1/chat/completions', json.dumps(body).encode(), {'Content-Type': 'application/json'}
    )
    with urllib.request.urlopen(request, timeout=HANG) as answer:
        return json.load(answer)['usage']
