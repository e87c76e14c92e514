"""``lmdeploy-vico plan``: what it prints, and that it loads nothing heavy."""

import json
import subprocess
import sys

import pytest

from lmdeploy_vico import cli

PLAN = ['plan', '--model', '8B', '--requests', '100']
CELL = {
    *('text_tokens', 'compression', 'requests_per_second', 'speedup', 'ttft_p50_ms', 'ttft_p99_ms'),
    *('kv_bytes_per_request', 'bottleneck'),
}


def test_json_has_a_cell_for_each_text_and_compression(capsys):
    texts, shares = ['64', '512'], ['0', '0.25', '0.5', '0.75']
    assert cli.main([*PLAN, '--text-tokens', *texts, '--compression', *shares, '--json']) == 0
    said = json.loads(capsys.readouterr().out)
    assert said['nature'] == 'model, not measured'
    assert [(cell['text_tokens'], cell['compression']) for cell in said['cells']] == [
        (text, share) for text in (64, 512) for share in (0.0, 0.25, 0.5, 0.75)
    ]
    assert all(set(cell) >= CELL for cell in said['cells'])
    assert 0 < said['errors']['table_4_64_text_tokens'] < 0.05 > said['errors']['table_4_512_text_tokens'] > 0


def test_the_table_says_what_it_is_and_how_far_off(capsys):
    assert cli.main([*PLAN, '--rate', '12', '--compression', '0', '0.75']) == 0
    out = ' '.join(capsys.readouterr().out.split())
    assert '8B on 1 x H200' in out and 'model, not measured' in out
    assert 'over' in out and 'more requests come than are answered' in out
    assert "off the paper's Table 4 by 4.0% at most" in out and 'by 4.5% in the 12 others' in out


def test_check_prints_every_ratio(capsys):
    assert cli.main(['plan', '--check', '--json']) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said['table_4']) == 24 and said['fitted'] == said['fitted_again']
    assert cli.main(['plan', '--check']) == 0
    out = capsys.readouterr().out
    assert out.count('│ 241B') == 6 and 'of three runs' in out
    assert len(said['errors']['cpu_llm_mode']) == 6


@pytest.mark.parametrize(
    'argv, said',
    [
        (['plan'], 'plan needs --model'),
        (['plan', '--model', '9B'], 'it takes 1B'),
        ([*PLAN, '--gpu', 'V100'], 'it takes A100-80G'),
        ([*PLAN, '--tp', '3'], '1, 2, 4, 8, 16, 32 work'),
        (['plan', '--model', '241B'], 'It would fit with --tp 4'),
        ([*PLAN, '--compression', '0.9'], 'from 0 to 0.75'),
        ([*PLAN, '--rate', '0'], '--rate takes'),
    ],
)
def test_what_cannot_be_is_a_sentence(argv, said, capsys):
    assert cli.main(argv) == 1
    assert said in capsys.readouterr().err


def test_a_number_that_is_none(capsys):
    for argv in ([*PLAN, '--tp', '0'], [*PLAN, '--tiles', 'ten']):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 2
    assert "takes a whole number, not 'ten'" in capsys.readouterr().err


def test_help_explains(capsys):
    with pytest.raises(SystemExit):
        cli.main(['plan', '--help'])
    out = capsys.readouterr().out
    assert 'It is a model, not a' in out and '241B' in out and 'A100-80G' in out


def test_no_torch_and_no_lmdeploy_are_loaded():
    code = (
        'import sys; from lmdeploy_vico import cli; '
        f'cli.main({[*PLAN, "--json"]!r}); '
        'print([name for name in ("torch", "lmdeploy", "transformers") if name in sys.modules], file=sys.stderr)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == '[]'


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'simpy', None)
    for module in ('simulation', 'plan'):
        monkeypatch.delitem(sys.modules, f'lmdeploy_vico.planning.{module}', raising=False)
        monkeypatch.delattr(f'lmdeploy_vico.planning.{module}', raising=False)
    assert cli.main(PLAN) == 1
    assert 'pip install ".[plan]"' in capsys.readouterr().err
