"""``benchmarks/share``: what a rank holds, the arithmetic of its report, and a run with a tiny model on the CPU."""

import json
import statistics
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from waiting import HANG

from benchmarks.share import run
from benchmarks.share.model import rank_share, whole
from benchmarks.share.prefills import Cell, Prompt
from benchmarks.share.report import Split, gpu_of_device, rows, said
from benchmarks.share.turns import filling, kinds
from lmdeploy_vico.bench.report.paper import SPEEDUPS
from lmdeploy_vico.checkpoints.names import LANGUAGE_MODEL
from lmdeploy_vico.checkpoints.random.published import tensor_shapes
from lmdeploy_vico.checkpoints.sizes import MODELS
from lmdeploy_vico.planning.calibration.paper import speedup
from lmdeploy_vico.planning.gpus import GPUS
from lmdeploy_vico.planning.language import LanguageModel
from lmdeploy_vico.planning.memory import language_bytes

ROOT = Path(__file__).parents[2]
H200 = GPUS['H200']


@pytest.mark.parametrize('name, tp', [('241B', 8), ('241B', 4), ('30B-A3B', 2), ('38B', 8), ('8B', 1)])
def test_a_share_has_the_bytes_that_a_rank_has(name, tp):
    """Those that a server's estimate of the KV cache counts for a rank, tensor by tensor."""
    shapes = tensor_shapes(rank_share(MODELS[name], tp))
    held = sum(2 * prod(shape) for tensor, shape in shapes.items() if tensor.startswith(LANGUAGE_MODEL))
    assert held == language_bytes(name, tp)


def test_the_share_of_the_241b():
    size = rank_share(MODELS['241B'], 8).size
    assert (size.hidden, size.layers, size.heads, size.kv_heads, size.head_dim) == (4096, 94, 8, 1, 128)
    assert (size.experts, size.experts_per_token, size.expert_mlp) == (128, 8, 192)
    assert rank_share(MODELS['241B'], 8, layers=3).size.layers == 3


@pytest.mark.parametrize('tp, layers', [(3, None), (128, None), (8, 0), (8, 95)])
def test_what_cannot_be_split_is_refused(tp, layers, tmp_path, capsys):
    with pytest.raises(ValueError):
        rank_share(MODELS['241B'], tp, layers)
    options = ['--tp', str(tp), '--output', str(tmp_path / 'new.json')]
    with pytest.raises(SystemExit):
        run.main(options if layers is None else [*options, '--layers', str(layers)])
    assert ('ranks cannot share' if layers is None else 'a share has 1 to 94 layers') in capsys.readouterr().err


def measured(work, alone, full, steps=4):
    """A cell as if its prompts, of the length on average, had taken so many seconds."""
    prompts = [Prompt([0] * int(work.tokens), []) for _ in range(filling(work, steps))]
    each = len(prompts) // steps
    return Cell(work, prompts, alone, full, steps=[each * int(work.tokens)] * steps)


def cells(scale=1.0):
    """Times that grow as the tokens do, and those of every other turn twice as long."""
    return [
        measured(work, [scale * work.tokens * 2e-5] * 3, [scale * work.tokens * 1e-5 * factor for factor in (1, 2, 1)])
        for work in kinds(10, (64, 512), (0.5, 0.75))
    ]


SPLIT = Split('241B', MODELS['241B'], 8, 94, H200)


def test_a_row_by_hand():
    row = next(one for one in rows(SPLIT, cells()) if (one['text_tokens'], one['token_compression']) == (64, 0.0))
    assert row['prompt_tokens'] == 2637 and row['step_tokens'] == [3 * 2637] * 4
    assert row['measured']['alone_ms'] == pytest.approx(2637 * 2e-2)
    assert row['measured']['request_ms'] == pytest.approx(26.37), 'the median'
    assert row['measured']['request_ms_slowest'] == pytest.approx(2 * 26.37)
    assert row['measured']['requests_per_second'] == pytest.approx(1e3 / 26.37)
    # Two all-reduces in each of 94 layers, of 3 prompts' bfloat16 values: each rank sends 7/4 of them.
    once = 20e-6 + 7 / 4 * 3 * 2637 * 4096 * 2 / 370e9
    assert row['modelled']['all_reduce_ms_request'] == pytest.approx(1e3 * 2 * 94 * once / 3)
    alone = 20e-6 + 7 / 4 * 2637 * 4096 * 2 / 370e9
    assert row['modelled']['all_reduce_ms_alone'] == pytest.approx(1e3 * 2 * 94 * alone)
    for name, reduces in (('request_ms', 'all_reduce_ms_request'), ('alone_ms', 'all_reduce_ms_alone')):
        assert row['together'][name] == pytest.approx(row['measured'][name] + row['modelled'][reduces])


def test_ratios_are_against_no_compression_and_the_same_text():
    made = rows(SPLIT, cells())
    for row in made:
        reference = next(one for one in made if one['text_tokens'] == row['text_tokens'])
        ratio = reference['together']['request_ms'] / row['together']['request_ms']
        assert row['speedup']['together'] == pytest.approx(ratio)
        share, text = row['token_compression'], row['text_tokens']
        assert row['speedup']['measured'] == pytest.approx(reference['prompt_tokens'] / row['prompt_tokens'])
        planned = speedup(LanguageModel('241B', H200, 8), text, share)
        assert row['speedup']['planned'] == pytest.approx(planned)
        paper = dict(zip((0.25, 0.5, 0.75), SPEEDUPS['241B'][text], strict=True)).get(share)
        assert row['speedup']['paper'] == paper
    assert [row['speedup']['together'] for row in made if row['token_compression'] == 0] == [1.0, 1.0]


def test_fewer_layers_are_scaled_and_it_is_said():
    half = Split('241B', MODELS['241B'], 8, 47, H200)
    for scaled, row in zip(rows(half, cells()), rows(SPLIT, cells(2.0)), strict=True):
        assert scaled['measured']['request_ms'] == pytest.approx(row['measured']['request_ms'])
        assert scaled['modelled'] == row['modelled'], 'all layers have all-reduces'
    assert 'scaled from 47 layers to 94' in said(half, rows(half, cells()))
    assert 'scaled' not in said(SPLIT, rows(SPLIT, cells()))


def test_a_cell_that_was_not_measured_has_no_row():
    first, *others = cells()
    empty = [Cell(cell.work, cell.prompts) for cell in others]
    [row] = rows(SPLIT, [first, *empty])
    assert row['speedup']['together'] == 1.0
    assert rows(SPLIT, empty) == []


def test_the_device_says_whose_all_reduces():
    names = {'NVIDIA H100 80GB HBM3': 'H100', 'NVIDIA H200': 'H200', 'NVIDIA A100-SXM4-80GB': 'A100-80G', 'CPU': 'H200'}
    assert {name: gpu_of_device(name).name for name in names} == names


@pytest.mark.long
@pytest.mark.server
def test_a_share_on_the_cpu(tmp_path):
    """LMDeploy's engine prefills every prompt at its true length, in full steps, and nothing else."""
    output = tmp_path / 'share.json'
    options = ['--like', 'tiny', '--tp', '2', '--tiles', '3', '--text-tokens', '64', '--rounds', '2', '--steps', '2']
    options += ['--token-compression', '0.25', '0.75', '--output', str(output)]
    command = [sys.executable, '-m', 'benchmarks', 'share', *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Measured: the share on this device. All-reduces: by the model of lmdeploy-vico plan' in done.stdout
    result = json.loads(output.read_text())
    assert result['complete'] and result['facts']['device'] == 'CPU' and result['facts']['lmdeploy']
    assert result['nature'].startswith('measured: prefills') and 'modelled: all-reduces' in result['nature']
    share = rank_share(whole('tiny'), 2)
    assert result['share']['heads'] == share.size.heads and result['share']['expert_mlp'] == share.size.expert_mlp
    assert [cell['token_compression'] for cell in result['cells']] == [0.0, 0.25, 0.75]
    for cell, prompt in zip(result['cells'], (845, 653, 269), strict=True):
        assert cell['prompt_tokens'] == prompt
        assert cell['step_tokens'] == [cell['prompts_together'] // 2 * prompt] * 2, 'two full steps, and no decoding'
        assert cell['measured']['rounds'] == 2 and cell['measured']['alone_ms'] > 0
        assert cell['planned'] is None and cell['speedup']['paper'] is None
        together, taken = cell['together']['request_ms'], cell['measured']['request_ms']
        assert together - taken == pytest.approx(cell['modelled']['all_reduce_ms_request'])
    assert statistics.mean(cell['modelled']['all_reduce_ms_request'] for cell in result['cells']) > 0
