"""``benchmarks/vision/rates.py``: both sides do the same work, and every number comes from what was timed."""

import json

import pytest
import torch

from benchmarks.lib import images
from benchmarks.lib.timing import Timing
from benchmarks.vision import rates

PICTURES, SECONDS = 2, 0.5
SIDES = ('ours', 'LMDeploy, flash', 'LMDeploy, plain')


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``run(*arguments)``: status, results and what was printed; everything is called once and takes SECONDS."""

    def once(functions, seconds):
        for function in functions.values():
            function()
        return {name: Timing.of([SECONDS], 0.0) for name in functions}

    def measure(*arguments):
        output = tmp_path / 'results.json'
        options = ['--like', 'tiny', '--layers', '1', '--device', 'cpu', '--images', str(PICTURES), '--latencies', '3']
        status = rates.main([*options, *arguments, '--output', str(output)])
        return status, json.loads(output.read_text()), capsys.readouterr().out

    monkeypatch.setattr(rates, 'undisturbed', once)
    monkeypatch.setattr(images, 'SIZE', (900, 900))  # four tiles and a thumbnail
    monkeypatch.setattr(images, 'SIDES', (450, 700))
    monkeypatch.setattr(rates, 'LARGE', (900, 450))
    images.jpeg.cache_clear()
    yield measure
    images.jpeg.cache_clear()


def test_all_parts(run):
    status, results, printed = run()
    assert status == 0 and results['complete']
    assert results['settings'] | {'like': 'tiny', 'layers': 1} == results['settings']
    rows = {(row['part'], row['case']): row for row in results['rates']}
    assert list(rows) == [
        *(('preparation', mix) for mix in images.MIXES),
        ('stage', f'{PICTURES} prompts of 10 tiles'),
        *(('end to end', mix) for mix in images.MIXES),
    ]
    for (part, _), row in rows.items():
        units = PICTURES * (10 if part == 'stage' else 1)
        sides = ('ours', 'LMDeploy') if part == 'preparation' else SIDES
        assert row['per_second'] == dict.fromkeys(sides, units / SECONDS) and not row['disturbed']
    assert set(results['latency']) == set(SIDES)
    assert all(len(taken['samples']) == 3 and taken['median'] > 0 for taken in results['latency'].values())
    assert set(results['work']['milliseconds']) == set(images.CONTENTS)
    assert all(text in printed for text in ('Rates: medians of turns', 'Preparation of one image', 'bytes to visual'))


def test_some_parts(run):
    status, results, printed = run('--parts', 'stage')
    assert status == 0 and results['complete']
    assert [row['part'] for row in results['rates']] == ['stage']
    assert 'latency' not in results and 'Preparation of one image' not in printed


def test_without_lmdeploy_ours_is_timed_alone(run, monkeypatch):
    monkeypatch.setattr(rates, 'MISSING', 'LMDeploy cannot be imported (it is a test)')
    status, results, printed = run('--parts', 'stage')
    assert status == 0
    assert [list(row['per_second']) for row in results['rates']] == [['ours']]
    assert 'it is a test): ours is timed alone' in printed and 'not here' in printed


def test_embeddings_that_differ_are_not_timed(run, monkeypatch):
    encode = rates.VisionPath.encode
    monkeypatch.setattr(rates.VisionPath, 'encode', lambda path, pixels: encode(path, pixels) * 1.01)
    with pytest.raises(AssertionError, match=r'embeddings differ from LMDeploy by 9\.9e-03|by 1\.0e-02'):
        run('--parts', 'stage')


def test_pixels_that_differ_are_not_timed(run, monkeypatch):
    cut = rates.cut
    monkeypatch.setattr(rates, 'cut', lambda image: cut(image) ^ 1)
    with pytest.raises(AssertionError, match='Tensor-likes are not close'):
        run('--parts', 'preparation')


def test_the_serial_share():
    assert rates.serial_share(2.0, 2) == 0.0
    assert rates.serial_share(1.0, 2) == 1.0
    assert rates.serial_share(8 / 4.5, 8) == pytest.approx(0.5)


def test_numbers_are_rounded():
    assert rates.rounded({1: [1.23456789, torch.float32.itemsize], 'a': (float('inf'),)}) == {
        '1': [1.2346, 4],
        'a': [float('inf')],
    }
