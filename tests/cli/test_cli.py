import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy_vico import __version__, cli
from lmdeploy_vico.checkpoints.random import is_tiny_checkpoint
from lmdeploy_vico.checkpoints.random.published import MODELS
from lmdeploy_vico.cli.making import tiny


def test_importing_the_command_loads_nothing_heavy():
    code = 'import sys, lmdeploy_vico.cli; print([m for m in ("torch", "lmdeploy", "rich", "PIL") if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'


def test_the_command_runs_as_a_module():
    out = subprocess.run([sys.executable, '-m', 'lmdeploy_vico.cli', '--version'], capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (0, f'lmdeploy-vico {__version__}\n')


def test_tiny_prints_the_directory(tmp_path, capsys):
    assert cli.main(['tiny', str(tmp_path / 'new'), '--plain']) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / 'new')
    assert is_tiny_checkpoint(tmp_path / 'new')


@pytest.mark.parametrize('plain', [[], ['--plain']])
def test_tiny_says_how_to_serve_it_on_a_gpu(tmp_path, capsys, plain):
    assert cli.main(['tiny', str(tmp_path / 'new'), *plain]) == 0
    flags = '--max-batch-size 32 --num-gpu-blocks 4096' + (' --trust-remote-code' if plain else '')
    assert capsys.readouterr().err == f'Serve it: lmdeploy serve api_server {tmp_path / "new"} {flags}\n'


def test_tiny_refuses_a_directory_in_use(tmp_path, capsys):
    (tmp_path / 'notes.txt').write_text('mine')
    assert cli.main(['tiny', str(tmp_path)]) == 1
    assert '--force' in capsys.readouterr().err
    assert cli.main(['tiny', str(tmp_path / 'notes.txt')]) == 1
    assert 'is not a directory' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('variable', 'value', 'said'),
    [
        ('LMDEPLOY_VICO', '0', 'inactive'),
        ('TORCH_DEVICE_BACKEND_AUTOLOAD', '0', 'inactive'),
        ('LMDEPLOY_VICO', 'cpu', 'CPU'),
    ],
)
def test_env_says_whether_the_plugin_is_active(monkeypatch, capsys, variable, value, said):
    monkeypatch.setenv(variable, value)
    assert cli.main(['env']) == 0
    out = capsys.readouterr().out
    assert said in next(line for line in out.splitlines() if line.startswith('plugin'))
    assert all(name in out for name in ('lmdeploy', 'torch', 'transformers', 'triton', 'device'))


@pytest.mark.parametrize(
    ('value', 'said'),
    [
        ('7', 'max_tiles = 7'),
        (
            'x',
            "wrong: max_tiles must be an integer of at least 1, not 'x', as the environment variable "
            'LMDEPLOY_VICO_MAX_TILES says.',
        ),
    ],
)
def test_env_reads_the_options(monkeypatch, capsys, value, said):
    monkeypatch.setenv('LMDEPLOY_VICO_MAX_TILES', value)
    assert cli.main(['env']) == 0
    assert f'{"option":15}{said}' in capsys.readouterr().out.splitlines()


def test_the_page_of_metrics_is_what_is_declared(capsys):
    assert cli.main(['metrics', '--markdown']) == 0
    page = (Path(__file__).parents[2] / 'docs' / 'metrics.md').read_text()
    assert page == capsys.readouterr().out, 'run: lmdeploy-vico metrics --markdown > docs/metrics.md'
    assert cli.main(['metrics']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'vico:remote_encoders' in lines and all(len(line) <= 100 for line in lines)


def test_demo_names_a_missing_checkpoint(tmp_path, capsys):
    assert cli.main(['demo', '--checkpoint', str(tmp_path)]) == 1
    assert 'config.json' in capsys.readouterr().err


def test_help_and_unknown_commands(capsys):
    for argv, status in ((['-h'], 0), (['tiny', '-h'], 0), (['serve'], 2)):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == status
    assert 'lmdeploy serve api_server' in capsys.readouterr().out
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith('usage: lmdeploy-vico')


def test_like_says_that_there_are_no_weights_and_how_to_serve(tmp_path, capsys):
    assert cli.main(['tiny', str(tmp_path / '8b'), '--like', '8B']) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == str(tmp_path / '8b')
    assert '--num-gpu-blocks' not in out, 'that of a real model is for LMDeploy to choose'
    assert 'no weights' in out and 'LMDEPLOY_VICO_DUMMY_WEIGHTS=1 lmdeploy serve api_server' in out
    assert not list((tmp_path / '8b').glob('*.safetensors*'))


def test_like_excludes_what_shapes_a_tiny_checkpoint(tmp_path, capsys):
    assert cli.main(['tiny', str(tmp_path / 'new'), '--like', '8B', '--llm', 'moe', '--seed', '0']) == 1
    assert 'leave out --llm, --seed (or add --weights).' in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()


def test_like_does_not_write_beside_weights(tmp_path, capsys):
    assert cli.main(['tiny', str(tmp_path / 'new')]) == 0
    config = (tmp_path / 'new' / 'config.json').read_bytes()
    assert cli.main(['tiny', str(tmp_path / 'new'), '--like', '1B', '--force']) == 1
    assert capsys.readouterr().err.endswith(
        'holds weights, which would not fit this config: choose another directory\n'
    )
    assert (tmp_path / 'new' / 'config.json').read_bytes() == config


def test_like_offers_every_published_model():
    assert list(MODELS) == list(tiny.PUBLISHED)
