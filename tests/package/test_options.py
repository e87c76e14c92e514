import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmdeploy_vico import cli, host_memory
from lmdeploy_vico.choices import Speedups
from lmdeploy_vico.options import DECLARATIONS, OptionError, Options


def load(overrides=None, **environ):
    return Options.load(overrides, environ)


def test_defaults():
    options = load(PATH='/bin', LMDEPLOY_VICO='1')
    assert options.compression == 'auto' and options.max_tiles == 40 and options.preprocess_threads >= 1


def test_reading_options_loads_neither_torch_nor_triton():
    code = (
        'import sys; from lmdeploy_vico.options import Options; Options.load({}, {}); '
        'print([m for m in ("torch", "triton", "lmdeploy", "numpy") if m in sys.modules])'
    )
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'


@pytest.mark.parametrize('limit, cached, decoded', [(None, 4, 16), (80, 4, 10), (8, 0.5, 1)])
def test_memory_by_default_is_a_share_of_what_a_container_may_use(monkeypatch, tmp_path, limit, cached, decoded):
    gib = 2**30
    monkeypatch.setattr(host_memory.psutil, 'virtual_memory', lambda: SimpleNamespace(total=1000 * gib))
    monkeypatch.setattr(host_memory, 'CGROUP', str(tmp_path))
    (tmp_path / 'memory.max').write_text('max\n' if limit is None else f'{limit * gib}\n')
    options = load()
    assert (options.cache_bytes, options.max_decoded_bytes) == (cached * gib, decoded * gib)


def test_environment():
    options = load(LMDEPLOY_VICO_COMPRESSION='0.5', LMDEPLOY_VICO_MAX_TILES='24', LMDEPLOY_VICO_VISION_DEVICE='cuda:1')
    assert (options.compression, options.max_tiles, options.vision_device) == (0.5, 24, 'cuda:1')
    assert load(LMDEPLOY_VICO_COMPRESSION='none').compression == 'none'


def test_overrides_win():
    overrides = {'rope_theta': 1, 'vico': {'compression': 'all', 'preprocess_threads': 3}}
    options = load(overrides, LMDEPLOY_VICO_COMPRESSION='none')
    assert (options.compression, options.preprocess_threads) == ('all', 3)


@pytest.mark.parametrize('text, flag', [('0', False), ('1', True), ('false', False), ('True', True)])
def test_flags(text, flag):
    assert load().dummy_weights is False
    assert load(LMDEPLOY_VICO_DUMMY_WEIGHTS=text).dummy_weights is flag
    assert load({'vico': {'dummy_weights': flag}}).dummy_weights is flag


@pytest.mark.parametrize(
    'overrides, environ, message',
    [
        (None, {'LMDEPLOY_VICO_COMPRESION': 'none'}, 'LMDEPLOY_VICO_COMPRESION is not an option; the options are comp'),
        (None, {'LMDEPLOY_VICO_COMPRESSION': 'most'}, 'compression must be "auto"'),
        (None, {'LMDEPLOY_VICO_COMPRESSION': '2'}, 'compression must be "auto"'),
        (None, {'LMDEPLOY_VICO_MAX_TILES': 'many'}, "max_tiles must be an integer of at least 1, not 'many'"),
        (None, {'LMDEPLOY_VICO_PREPROCESS_THREADS': '0'}, 'preprocess_threads must be an integer of at least 1'),
        (None, {'LMDEPLOY_VICO_VISION_DEVICE': ''}, 'vision_device must be'),
        (None, {'LMDEPLOY_VICO_KERNELS': 'cuda'}, "kernels must be one of auto, triton, torch, not 'cuda'"),
        ({'vico': {'kernels': ['torch']}}, {}, 'kernels must be one of auto'),
        (
            None,
            {'LMDEPLOY_VICO_VIT_SPEEDUPS': 'cudnn'},
            'vit_speedups must be a comma-separated list of cudnn_attention',
        ),
        ({'vico': {'vit_speedups': True}}, {}, 'vit_speedups must be a comma-separated list of cudnn_attention'),
        (None, {'LMDEPLOY_VICO_DUMMY_WEIGHTS': '2'}, 'dummy_weights must be 0, 1, true or false, not 2'),
        ({'vico': {'synthetic_images': 1.0}}, {}, 'synthetic_images must be 0, 1, true or false, not 1.0'),
        (
            {'vico': {'compression': 'random:0.5'}},
            {'LMDEPLOY_VICO_PRESSURE_COMPRESSION': '0.5'},
            'pressure_compression has no effect with compression random:0.5, which is for experiments: set only one',
        ),
        ({'vico': 'none'}, {}, '"vico" must be an object'),
        ({'vico': {'tiles': 3}}, {}, "'tiles' is not an option"),
        ({'vico': {'tile_batch': True}}, {}, 'tile_batch must be an integer'),
    ],
)
def test_mistakes_stop_the_start(overrides, environ, message):
    with pytest.raises(OptionError, match=message):
        load(overrides, **environ)


@pytest.mark.parametrize(
    'overrides, environ, source',
    [
        (None, {'LMDEPLOY_VICO_MAX_TILES': '0'}, 'not 0, as the environment variable LMDEPLOY_VICO_MAX_TILES says.'),
        ({'vico': {'max_tiles': 'x'}}, {'LMDEPLOY_VICO_MAX_TILES': '0'}, 'not \'x\', as --hf-overrides "vico" says.'),
    ],
)
def test_mistakes_say_where_they_were_made(overrides, environ, source):
    with pytest.raises(OptionError) as refusal:
        load(overrides, **environ)
    assert str(refusal.value) == f'max_tiles must be an integer of at least 1, {source}'


def test_the_language_engine_is_chosen_in_the_environment_only():
    assert load().language_engine == 'pytorch'
    assert load(LMDEPLOY_VICO_LANGUAGE_ENGINE='turbomind').language_engine == 'turbomind'
    with pytest.raises(
        OptionError, match='by the environment variable LMDEPLOY_VICO_LANGUAGE_ENGINE only, as LMDeploy'
    ):
        load({'vico': {'language_engine': 'pytorch'}}, LMDEPLOY_VICO_LANGUAGE_ENGINE='pytorch')
    with pytest.raises(OptionError, match="language_engine must be one of pytorch, turbomind, not 'TurboMind'"):
        load(LMDEPLOY_VICO_LANGUAGE_ENGINE='TurboMind')


def test_an_override_replaces_a_mistake_in_the_environment():
    assert load({'vico': {'max_tiles': 7}}, LMDEPLOY_VICO_MAX_TILES='many').max_tiles == 7


@pytest.mark.parametrize('name', DECLARATIONS)
def test_values_that_were_read_may_be_given_again(name):
    options = load(LMDEPLOY_VICO_VIT_SPEEDUPS='residual_norm')
    assert dataclasses.replace(options, **{name: getattr(options, name)}) == options


def test_the_documents_are_the_declaration(capsys):
    assert cli.main(['options', '--markdown']) == 0
    page = (Path(__file__).parents[2] / 'docs' / 'options.md').read_text()
    assert page == capsys.readouterr().out, 'run: lmdeploy-vico options --markdown > docs/options.md'
    rows = [line.split('|')[1:-1] for line in page.splitlines() if line.startswith('| `')]
    assert [row[0].strip(' `') for row in rows] == [field.name for field in dataclasses.fields(Options)]
    assert all(len(row) == 4 and all(cell.strip() for cell in row) for row in rows)


def test_the_command_lists_every_option(capsys):
    assert cli.main(['options']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(DECLARATIONS) <= set(lines)
    assert all(len(line) <= 100 for line in lines)


def test_vit_speedups():
    assert not load().vit_speedups
    some = Speedups(cudnn_attention=True, padded_patches=True)
    assert load(LMDEPLOY_VICO_VIT_SPEEDUPS='cudnn_attention,padded_patches').vit_speedups == some
    assert load({'vico': {'vit_speedups': 'padded_patches, cudnn_attention'}}).vit_speedups == some
    assert not load({'vico': {'vit_speedups': ''}}, LMDEPLOY_VICO_VIT_SPEEDUPS='residual_norm').vit_speedups
