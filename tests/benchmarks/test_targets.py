"""``benchmarks/gates/targets.py``: which number meets which target, from small results as the benchmarks write them."""

import json

import pytest

from benchmarks.gates import targets
from lmdeploy_vico.bench.report.paper import SHARES, SPEEDUPS
from lmdeploy_vico.bench.report.results import CellResult
from lmdeploy_vico.bench.workload.requests import Cell
from lmdeploy_vico.checkpoints.random.published import MODELS

H200 = 'NVIDIA H200'


def cell(speedup, mode='llm', text=64, share=0.5, server='none', failed=0):
    entry = CellResult(Cell(mode, server, text, share), targets.TILES).as_json(speedup, None)
    return entry | {'failed': failed}


def first_token(folder, name, *cells, model='8B', device=f'{H200} x 1', complete=True, **arguments):
    content = {'benchmark': 'first_token', 'complete': complete, 'paper_model': model}
    content['arguments'] = {'tiles': 10, 'baseline': ['none'], **arguments}
    content |= {'environment': {'device': device}, 'cells': cells}
    (folder / f'{name}.json').write_text(json.dumps(content))


def vision(folder, like, rate, milliseconds, layers=None, disturbed=False):
    row = {'part': 'stage', 'per_second': {'ours': rate, 'LMDeploy, plain': 1.0}, 'disturbed': disturbed}
    content = {
        'facts': {'device': H200},
        'settings': {'like': like, 'layers': layers or targets.LAYERS[like]},
        'rates': [{'part': 'preparation', 'per_second': {'ours': 1.0}, 'disturbed': False}, row],
        'latency': {'ours': {'median': milliseconds}},
    }
    (folder / f'2026-01-01-h200-vision-{like}.json').write_text(json.dumps(content))


def a_share(folder, name, speedup, layers=94, tiles=10, complete=True, model='241B'):
    row = {'text_tokens': 64, 'token_compression': 0.75, 'speedup': {'measured': 9.0, 'together': speedup}}
    content = {'benchmark': 'share', 'facts': {'device': H200}, 'model': model, 'arguments': {'tiles': tiles}}
    content |= {'layers': layers, 'all_layers': 94, 'complete': complete, 'cells': [row]}
    (folder / f'{name}.json').write_text(json.dumps(content))


def rows(capsys, folder):
    """Title, verdict and file of every row that the command prints."""
    assert targets.main([str(folder)]) == 0
    lines = [line.split('│')[1:-1] for line in capsys.readouterr().out.splitlines() if '│' in line]
    return {cells[0].strip(): (cells[3].strip(), cells[4].strip()) for cells in lines}


def test_llm_targets_are_the_papers_or_what_the_flop_allow():
    ratios = {
        text: [round(targets.flop_ratio(MODELS['8B'].size, text, share), 2) for share in SHARES] for text in (64, 512)
    }
    assert ratios == {64: [1.34, 2.00, 3.88], 512: [1.28, 1.76, 2.77]}
    wanted = {text: [targets.llm_target('8B', text, share) for share in SHARES] for text in (64, 512)}
    assert wanted[64] == list(SPEEDUPS['8B'][64])
    assert wanted[512] == [pytest.approx(0.98 * 1.28), 1.76, 2.77]
    assert targets.llm_target('30B', 512, 0.75) == 2.72
    assert targets.flop_ratio(MODELS['30B-A3B'].size, 64, 0.75) > targets.flop_ratio(MODELS['38B'].size, 64, 0.75)


def test_nothing_is_measured_yet(tmp_path, capsys):
    (tmp_path / 'other.json').write_text('{"rows": []}')
    (tmp_path / 'list.json').write_text('[]')
    (tmp_path / 'cut.json').write_text('{"benchmark": ')
    found = rows(capsys, tmp_path)
    assert len(found) == 2 + 1 + 18 + 6 + 6 + 2
    assert set(found.values()) == {('not measured', '')}


def test_met_and_missed(tmp_path, capsys):
    first_token(tmp_path, 'llm', cell(1.98), cell(3.75, share=0.75), cell(1.26, text=512, share=0.25))
    first_token(tmp_path, 'big', cell(1.98), model='38B')
    first_token(tmp_path, 'image', cell(1.6, 'image'), cell(1.4, 'image', text=512), cell(2.2, 'image', share=0.75))
    vision(tmp_path, '300M', 650.0, 59.0)
    vision(tmp_path, '6B', 47.9, 300.0)
    found = {title: shown for title, shown in rows(capsys, tmp_path).items() if shown[0] != 'not measured'}
    assert found == {
        'ViT-300M, stage': ('met', '2026-01-01-h200-vision-300M.json'),
        'ViT-300M, one picture of 13 tiles': ('met', '2026-01-01-h200-vision-300M.json'),
        'ViT-6B, stage': ('MISSED', '2026-01-01-h200-vision-6B.json'),
        '8B, language model alone, 64 text tokens, 50% removed': ('met', 'llm.json'),
        '8B, language model alone, 64 text tokens, 75% removed': ('MISSED', 'llm.json'),
        '8B, language model alone, 512 text tokens, 25% removed': ('met', 'llm.json'),
        '38B, language model alone, 64 text tokens, 50% removed': ('MISSED', 'big.json'),
        '8B, images, 50% removed': ('MISSED', 'image.json'),  # the lowest of the texts
        '8B, images, 75% removed': ('met', 'image.json'),
    }


def test_what_counts_and_what_does_not(tmp_path, capsys):
    title = '8B, language model alone, 64 text tokens, 50% removed'
    first_token(tmp_path, '1', cell(2.5, failed=3))
    assert rows(capsys, tmp_path)[title] == ('MISSED, 3 requests failed', '1.json')
    first_token(tmp_path, '2', cell(1.99), complete=False)
    assert rows(capsys, tmp_path)[title] == ('met, not run to its end', '2.json')
    # None of these is about the target: another model, tiles, a baseline, a cell that was lost.
    first_token(tmp_path, '3', cell(9.0), model=None)
    first_token(tmp_path, '4', cell(9.0), tiles=3)
    first_token(tmp_path, '5', cell(9.0, server='lmdeploy-flash'), cell(None))
    vision(tmp_path, '300M', 9e9, 1.0, layers=2)
    found = rows(capsys, tmp_path)
    assert found[title] == ('met, not run to its end', '2.json')
    assert found['ViT-300M, stage'][0] == 'not measured'
    vision(tmp_path, '300M', 601.0, 61.0, disturbed=True)
    assert rows(capsys, tmp_path)['ViT-300M, stage'][0] == 'met, disturbed by others'


def test_a_run_beside_a_baseline_does_not_replace_one_without(tmp_path, capsys):
    title = '8B, images, 50% removed'
    baseline = cell(None, 'image', share=None, server='lmdeploy-flash')
    first_token(tmp_path, 'baselines-1', cell(1.7, 'image'), baseline)
    first_token(tmp_path, 'baselines-2', cell(1.6, 'image'), baseline)
    assert rows(capsys, tmp_path)[title] == ('met', 'baselines-2.json'), 'where there is no other'
    first_token(tmp_path, 'image-1', cell(1.2, 'image'))
    assert rows(capsys, tmp_path)[title] == ('MISSED', 'image-1.json')
    first_token(tmp_path, 'later', cell(1.8, 'image'), baseline)
    first_token(tmp_path, 'later-cut-off', cell(1.9, 'image'), complete=False, baseline=['lmdeploy-flash'])
    assert rows(capsys, tmp_path)[title] == ('MISSED', 'image-1.json')


def test_each_language_engine_has_targets_of_its_own(tmp_path, capsys):
    cells = cell(1.98), cell(1.5, server='turbomind'), cell(9.0, 'image', server='turbomind')
    first_token(tmp_path, 'turbomind', *cells)
    found = {title: shown for title, shown in rows(capsys, tmp_path).items() if shown[0] != 'not measured'}
    assert found == {
        '8B, language model alone, 64 text tokens, 50% removed': ('met', 'turbomind.json'),
        '8B on TurboMind, alone, 64 text tokens, 50% removed': ('MISSED', 'turbomind.json'),
    }


def test_a_share_counts_with_its_all_reduces(tmp_path, capsys):
    title = "241B, a rank's share, 64 text tokens, 75% removed"
    a_share(tmp_path, '1', 3.76)
    assert rows(capsys, tmp_path)[title] == ('met, all-reduces by a model', '1.json')
    a_share(tmp_path, '2', 3.75, complete=False)
    assert rows(capsys, tmp_path)[title] == ('MISSED, not run to its end', '2.json')
    # Fewer layers, other prompts, and another model are not what the target is about; without a reference no ratio is.
    a_share(tmp_path, '3', 9.0, layers=47)
    a_share(tmp_path, '4', 9.0, tiles=3)
    a_share(tmp_path, '5', 9.0, model='tiny')
    a_share(tmp_path, '6', None)
    assert rows(capsys, tmp_path)[title] == ('MISSED, not run to its end', '2.json')


def test_devices_have_tables_of_their_own(tmp_path, capsys):
    first_token(tmp_path, 'one', cell(2.0))
    first_token(tmp_path, 'two', cell(1.0), device='NVIDIA H100 80GB HBM3 x 1')
    targets.main([str(tmp_path)])
    out = capsys.readouterr().out
    titles = [line.partition('measured on: ')[2].strip() for line in out.splitlines() if 'measured on' in line]
    assert sorted(titles) == ['NVIDIA H100 80GB HBM3', 'NVIDIA H200']
    assert out.count('MISSED') == 1 and out.count(' met ') == 1
    assert targets.main([str(tmp_path / 'none')]) == 2
