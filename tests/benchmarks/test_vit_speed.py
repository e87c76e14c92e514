"""``benchmarks/vision/vit_speed.py``: its verdicts, and that what is wrong is not timed."""

import json

import pytest
import torch

from benchmarks.lib.timing import Timing
from benchmarks.vision import vit_speed
from benchmarks.vision.vit_speed import Variant, judge, main, plan
from lmdeploy_vico.choices import NO_SPEEDUPS
from lmdeploy_vico.vision.model import intern_vit

CPU, CUDA = torch.device('cpu'), torch.device('cuda')


@pytest.mark.parametrize(
    'found, noise, device, verdict',
    [
        ({'right': True, 'bits': True, 'gain': 6.0, 'sure_gain': 5.0}, 0.3, CUDA, 'turn on: +6.0 %'),
        ({'right': True, 'bits': True, 'gain': 6.0, 'sure_gain': 5.0}, 2.6, CUDA, 'leave off: +6.0 % (noise 2.6 %)'),
        ({'right': True, 'bits': True, 'gain': 6.0, 'sure_gain': 0.9}, 0.3, CUDA, 'leave off: +6.0 % (noise 0.3 %)'),
        ({'right': True, 'bits': True, 'gain': -1.0, 'sure_gain': -2.0}, 0.0, CUDA, 'leave off: -1.0 % (noise 0.0 %)'),
        ({'right': True, 'gain': 6.0, 'sure_gain': 5.0}, 0.3, CUDA, 'leave off: bits do not hold (+6.0 %)'),
        ({'bits': True, 'error': 0.25}, 0.3, CUDA, 'leave off: wrong by 2.5e-01'),
        ({'right': True, 'bits': True, 'gain': 6.0, 'sure_gain': 5.0}, 0.3, CPU, 'leave off: +6.0 % on a CPU'),
    ],
)
def test_verdicts(found, noise, device, verdict):
    assert judge(Variant(NO_SPEEDUPS, **found), noise, device).startswith(verdict)


@pytest.mark.parametrize('like', ['300M', '6B', 'tiny'])
def test_a_run_says_how_long_it_takes_and_stays_below_ten_minutes(like):
    total, arithmetic = plan(like, 'cuda', 5.0)
    assert '7 variants x 5 s = 35 s' in arithmetic
    assert total <= vit_speed.LIMIT < 600


def test_too_many_seconds_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['--like', 'tiny', '--device', 'cpu', '--seconds', '100', '--output', str(tmp_path / 'out.json')])
    assert 'give fewer --seconds' in capsys.readouterr().err


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run()``: the exit status, the results, and the names of what was timed, without taking the time."""
    timed = []

    def once(functions, seconds):
        timed.extend(functions)
        for function in functions.values():
            function()
        return {name: Timing.of([0.5 if name == 'padded_patches' else 1.0]) for name in functions}

    def measure():
        output = tmp_path / 'results.json'
        arguments = ['--like', 'tiny', '--layers', '1', '--device', 'cpu', '--seconds', '0.1']
        status = main([*arguments, '--output', str(output)])
        return status, json.loads(output.read_text()), timed

    monkeypatch.setattr(vit_speed, 'interleaved', once)
    return measure


def test_a_run_on_a_cpu(run, capsys):
    status, results, timed = run()
    assert status == 0
    assert timed == ['none', 'padded_patches', 'none again']
    assert set(results['not_here']) == {'cudnn_attention', 'residual_norm', 'strided_qk_norm'}
    assert results['facts']['commit'] and results['layers'] == 1
    variant = results['variants']['padded_patches']
    assert variant['right'] and variant['bits'] and variant['gain'] == 100
    assert variant['tiles_per_second'] == results['tile_batch'] / 0.5
    shown = capsys.readouterr().out
    assert 'padded_patches: leave off: +100.0 % on a CPU' in ' '.join(shown.split())
    assert 'cudnn_attention: not here, it needs a CUDA device' in ' '.join(shown.split())


def test_what_is_wrong_is_not_timed(run, monkeypatch):
    rows = intern_vit._padded_rows
    monkeypatch.setattr(intern_vit, '_padded_rows', lambda patches, dtype: rows(patches, dtype) * 1.001)
    status, results, timed = run()
    assert status == 1
    assert timed == ['none', 'none again']
    variant = results['variants']['padded_patches']
    assert not variant['right'] and variant['timing'] is None and variant['tiles_per_second'] is None
    assert variant['verdict'].startswith('leave off: wrong by ')


def test_bits_that_depend_on_the_place_are_found(run, monkeypatch):
    rows = intern_vit._padded_rows

    def by_place(patches, dtype):
        made = rows(patches, dtype)
        made[1:] *= 1 + 2**-22
        return made

    monkeypatch.setattr(intern_vit, '_padded_rows', by_place)
    status, results, _ = run()
    assert status == 0
    assert not results['variants']['padded_patches']['bits']
    assert results['variants']['none']['bits']
    assert results['variants']['padded_patches']['verdict'].startswith('leave off: bits do not hold')
