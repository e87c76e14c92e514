"""What the CPU backend changes, when, and how often."""

import base64
import io
import json
import os
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import pytest

from lmdeploy_vico.cpu import hooks, memory, selection
from lmdeploy_vico.testing.server import ApiServer


def run(code: str, **environment: str) -> str:
    """Run Python code in a process of its own and return what it printed."""
    result = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


SNAPSHOT = textwrap.dedent("""
    def snapshot():
        import inspect, torch
        names = {f'cuda.{n}': v for n, v in vars(torch.cuda).items() if not inspect.ismodule(v)}
        names |= {n: v for n, v in vars(torch).items() if callable(v)}
        names |= {f'Tensor.{n}': v for n, v in vars(torch.Tensor).items()}
        return {n: id(v) for n, v in names.items()}
""")


@pytest.mark.parametrize('first', ['torch', 'lmdeploy'])
def test_importing_changes_nothing_in_torch(first):
    code = f"""
        import {first}, torch
        before = snapshot()
        import lmdeploy, lmdeploy.cli.serve, lmdeploy.vl.engine
        import sys
        import lmdeploy.pytorch.engine.engine, lmdeploy.pytorch.engine.executor.mp_executor
        after = snapshot()
        print([n for n in before if before[n] != after.get(n)])
        views = [n for n, m in sys.modules.items() if type(vars(m).get('torch', sys)).__name__ == 'TorchView']
        print(views)
        print('lmdeploy_vico.cpu.engine' in sys.modules)
    """
    code = SNAPSHOT + textwrap.dedent(code)
    off = run(code, LMDEPLOY_VICO='0')
    on = run(code, LMDEPLOY_VICO='cpu')
    # PyTorch itself wraps a function or two when LMDeploy makes it import its compiler.
    assert on == off
    assert on.splitlines()[1:] == ['[]', 'False']


@pytest.mark.parametrize('first', ['torch', 'lmdeploy'])
def test_both_import_orders_answer_without_cuda(first):
    code = f"""
        import {first}
        import lmdeploy.cli.serve, lmdeploy.utils, lmdeploy.vl.engine, lmdeploy.pytorch.config
        import lmdeploy.pytorch.engine.config_builder as builder
        for module in (lmdeploy.cli.serve, lmdeploy.utils, builder):
            print(module.get_max_batch_size('cuda'), module.get_max_batch_size('ascend'))
        for module in (lmdeploy.utils, lmdeploy.vl.engine, lmdeploy.pytorch.config):
            print(module.is_bf16_supported('cuda'), module.is_bf16_supported())
    """
    lines = run(textwrap.dedent(code), LMDEPLOY_VICO='cpu').splitlines()
    assert lines == [f'{hooks.MAX_BATCH_SIZE} 256'] * 3 + ['True True'] * 3


def test_hooks_and_patches_are_idempotent():
    code = """
        import importlib, sys
        from lmdeploy_vico.cpu import engine, hooks

        def state():
            found = {}
            for name, module in sorted(sys.modules.items()):
                if name.startswith('lmdeploy.'):
                    for key, value in vars(module).items():
                        found[name, key] = id(value)
                        if isinstance(value, type):
                            found |= {(name, key, n): id(v) for n, v in vars(value).items() if callable(v)}
            return found

        modules = {name: importlib.import_module(name) for name in hooks.HOOKS}
        engine.install()
        before = state()
        for name, hook in hooks.HOOKS.items():
            hook(modules[name])
        engine.install()
        print(before == state())
    """
    assert run(textwrap.dedent(code), LMDEPLOY_VICO='cpu') == 'True\n'


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


def test_api_server_starts_and_answers(make_checkpoint, pictures, tmp_path):
    """No option but the address: LMDeploy's own class serves a plain InternVL checkpoint, announced once."""
    checkpoint = make_checkpoint(flash=False)
    buffer = io.BytesIO()
    pictures['chelsea'].resize((300, 300)).save(buffer, 'PNG')
    picture = f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'
    with ApiServer(checkpoint, log=tmp_path / 'log') as server:
        text = ask(server, checkpoint, 'hello')
        image = ask(
            server,
            checkpoint,
            [{'type': 'text', 'text': 'hello'}, {'type': 'image_url', 'image_url': {'url': picture}}],
        )
        log = server.log_text()
    assert text['completion_tokens'] == image['completion_tokens'] == 4
    assert image['prompt_tokens'] >= text['prompt_tokens'] + 256
    assert log.count(selection.MESSAGE) == 1


def ask(server: ApiServer, checkpoint: Path, content: str | list) -> dict:
    """Post one chat request and return its usage."""
    body = {'model': str(checkpoint), 'max_tokens': 4, 'temperature': 0, 'ignore_eos': True}
    body['messages'] = [{'role': 'user', 'content': content}]
    request = urllib.request.Request(
        f'{server.url}/v1/chat/completions', json.dumps(body).encode(), {'Content-Type': 'application/json'}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)['usage']
