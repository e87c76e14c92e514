"""``benchmarks/lib/compare.py``: when something is slower, and what results of ``lmdeploy-vico bench`` are compared."""

import copy
import json
import re

import pytest

from benchmarks.gates import check
from benchmarks.lib.compare import Comparison


@pytest.mark.parametrize(
    ('was', 'now', 'slower'),
    [
        ([1.0, 1.1], [1.0, 1.1], False),
        ([1.0, 1.1], [1.15, 9.0], False),  # 4.5 % above the slowest
        ([1.0, 1.1], [1.16, 1.2], True),
        ([1.0, 1.1], [0.5], False),
        ([2.0], [2.11], True),  # one round each: the threshold alone
        ([1.0], [], True),  # it failed
    ],
)
def test_the_rule(was, now, slower):
    assert Comparison('case', was, now).regressed(0.05) is slower


def cell(server='none', compression=0.0, rounds=(10.0, 10.2, 10.1, 10.0)):
    about = {'mode': 'llm', 'server': server, 'text_tokens': 64, 'token_compression': compression}
    return about | {'completed': 1000, 'failed': 0, 'error': None, 'round_durations': list(rounds)}


def first_token(**changes):
    """Results of ``lmdeploy-vico bench``: four rounds of three cells, three quarters of the tokens twice as fast."""
    cells = [cell(), cell(compression=0.75, rounds=(5.0, 5.1, 5.2, 5.0)), cell('lmdeploy-flash', None)]
    arguments = {'num_prompts': 1000, 'max_concurrency': 32, 'tiles': 10, 'images': None, 'seed': 0}
    arguments |= {'server_arguments': [], 'servers': 'auto', 'baseline': ['none'], 'count_prefills': False}
    servers = {name: f'lmdeploy serve {name}' for name in ('none', 'lmdeploy-flash')}
    variables = {name: {'LMDEPLOY_VICO_CACHE_BYTES': '0'} for name in servers}
    environment = {'device': 'NVIDIA X', 'torch': '2.12.1', 'commit': 'abc'}
    content = {'benchmark': 'first_token', 'complete': True, 'model': '/models/8B', 'arguments': arguments}
    content |= {'servers': servers, 'servers_together': False, 'environment_variables': variables}
    return content | {'environment': environment, 'cells': cells} | changes


@pytest.fixture
def compare(tmp_path):
    """``compare(new)``: the exit status for these results against :func:`first_token`, or against others."""

    def run(new, *options, old=None):
        for name, content in (('old', old or first_token()), ('new', new)):
            (tmp_path / name).write_text(json.dumps(content))
        return check.main(['--first-token', str(tmp_path / 'new'), '--against', str(tmp_path / 'old'), *options])

    return run


def times(content, index, factor):
    """The same results with the seconds of a cell multiplied."""
    changed = copy.deepcopy(content)
    changed['cells'][index]['round_durations'] = [factor * took for took in content['cells'][index]['round_durations']]
    return changed


def test_first_token_results_by_cell(compare, capsys):
    new = first_token()
    assert compare(new) == 0
    said = capsys.readouterr().out
    assert 'None of 2 got slower' in said and said.count('1/speed-up') == 1  # of the one cell that has one

    new = times(new, 1, 1.16)
    assert compare(new) == 1
    said = capsys.readouterr().out
    assert '1 of 2 got slower' in said and '75%: s/request (+11.5%)' in said and 'Noted: llm' in said
    assert compare(new, '--threshold', '0.2') == 0


def test_what_gets_faster_fails_nothing(compare, capsys):
    assert compare(times(first_token(), 0, 0.5)) == 0  # what is not compressed: the speed-up is gone
    said = capsys.readouterr().out
    assert 'Noted: llm, lmdeploy-vico, 64 text tokens, 75%: 1/speed-up' in said and 'None of 2 got slower' in said
    faster = times(times(first_token(), 0, 0.5), 1, 0.5)
    assert compare(faster) == 0  # LMDeploy's time over ours doubles
    assert 'Noted' not in capsys.readouterr().out


def test_a_baseline_fails_nothing(compare, capsys):
    assert compare(times(first_token(), 2, 2)) == 0
    said = capsys.readouterr().out
    assert "s/request (+96.1%). That is LMDeploy's code" in said and 'None of 2 got slower' in said
    assert compare(first_token(cells=first_token()['cells'][:2])) == 0
    assert 'lmdeploy-flash, 64 text tokens, as it is is not in both files' in capsys.readouterr().out


def test_a_cell_that_fails_now(compare, capsys):
    new = first_token()
    failed = {'completed': 0, 'error': 'the engine ended', 'round_durations': []}
    new['cells'][1] |= failed
    assert compare(new) == 1
    assert '75%: s/request (failed)' in capsys.readouterr().out
    new = first_token()
    new['cells'][2] |= failed
    assert compare(new) == 0


def test_a_cell_that_is_gone(compare, capsys):
    new = first_token()
    del new['cells'][1]
    assert compare(new) == 2
    assert 'Stored, but not in the new file: llm, lmdeploy-vico, 64 text tokens, 75%.' in capsys.readouterr().out
    assert compare(times(new, 0, 2)) == 1


def test_first_token_results_of_other_versions(compare, capsys):
    environment = first_token()['environment']
    assert compare(first_token(environment=environment | {'torch': '2.13', 'commit': 'def'})) == 0
    assert 'measured with torch 2.12.1, not 2.13.' in capsys.readouterr().out
    assert compare(first_token(model='/elsewhere/8B')) == 0
    assert compare(first_token(complete=False)) == 2
    assert 'new file holds no complete results' in capsys.readouterr().err


def arguments(**changes):
    return {'arguments': first_token()['arguments'] | changes}


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'environment': {'device': 'NVIDIA Y'}}, 'device NVIDIA X, not NVIDIA Y'),
        ({'model': '/models/38B'}, 'model 8B, not 38B'),
        (arguments(tiles=12), 'tiles 10, not 12'),
        (arguments(server_arguments=['--tp', '2']), "server_arguments [], not ['--tp', '2']"),
        (arguments(count_prefills=True), 'count_prefills False, not True'),
        ({'servers_together': True}, 'servers running at the same time False, not True'),
        (
            {'environment_variables': {'none': {'LMDEPLOY_VICO_DUMMY_WEIGHTS': '1'}}},
            "environment variables {'LMDEPLOY_VICO_CACHE_BYTES': '0'}, not {'LMDEPLOY_VICO_DUMMY_WEIGHTS': '1'}",
        ),
        (
            {'environment_variables': None},
            "environment variables {'LMDEPLOY_VICO_CACHE_BYTES': '0'}, not that nobody has noted",
        ),
    ],
)
def test_other_first_token_experiments_are_refused(compare, capsys, changes, said):
    assert compare(first_token(**changes)) == 2
    assert re.search(f'different experiments; the old one has .*{re.escape(said)}', capsys.readouterr().err)


def test_what_makes_no_other_experiment(compare):
    variables = {'none': {'LMDEPLOY_VICO_CACHE_BYTES': '0', 'LMDEPLOY_VICO_SYNTHETIC_IMAGES': '1'}}
    assert compare(first_token(environment_variables=variables)) == 0  # the command sets that for one mode of two
    variables = {'none': {'LMDEPLOY_VICO_CACHE_BYTES': '0', 'CUDA_VISIBLE_DEVICES': '1'}}
    assert compare(first_token(environment_variables=variables)) == 0
    assert compare(first_token(**arguments(baseline=['none', 'lmdeploy-flash'], servers='in-turn'))) == 0
    assert compare(first_token(servers={'none': ''}, servers_together=True)) == 0  # together with no other
    before = first_token(servers={'none': 'http://localhost:23333'})
    for key in ('environment_variables', 'servers_together'):
        del before[key]
    for key in ('server_arguments', 'count_prefills', 'servers', 'baseline'):
        del before['arguments'][key]
    assert compare(copy.deepcopy(before), old=before) == 0
