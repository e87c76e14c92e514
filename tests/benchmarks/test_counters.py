"""``benchmarks/gates/counters.py``: what requests make the engine and the vision side do is what was committed."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console

from benchmarks.gates import counters
from lmdeploy_vico.kernels import pack

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='the counters are those of a CPU')


@pytest.fixture(scope='module')
def committed():
    return json.loads(counters.COMMITTED.read_text())


@pytest.fixture(scope='module')
def measured(make_checkpoint):
    return counters.measure(make_checkpoint())


def report(was, now):
    console = Console(width=150, file=io.StringIO())
    changed = counters.report(was, now, console)
    return changed, console.file.getvalue()


@pytest.mark.server
def test_the_counters_are_the_committed_ones(committed, measured):
    changed, text = report(committed, measured)
    assert not changed, text


@pytest.mark.server
def test_they_say_what_they_are_meant_to(measured):
    found = measured['requests']
    for one in found.values():
        assert one['visual_tokens'] == 64 * one['tiles_compressed'] + 256 * one['tiles_full']
        assert one['kv_blocks'] == -(-one['prompt_tokens'] // 64)
        assert one['prefill_steps'] >= -(-one['prefilled_tokens'] // counters.MAX_PREFILL_TOKENS)
        assert (one['tiles_encoded'] > 0) == (one['device_batches'] > 0) == (one['encoding_operators'] > 0)
    first, again, full = (found[name] for name in ('one picture', 'the same again', 'the same, uncompressed'))
    assert (first['tiles_encoded'], first['device_batches'], first['tiles_compressed']) == (7, 2, 2)
    assert again['tiles_encoded'] == full['tiles_encoded'] == 0
    assert again['prefilled_tokens'] < counters.KV_BLOCK < first['prefilled_tokens'] == first['prompt_tokens']
    assert full['visual_tokens'] == 7 * 256 and full['projecting_operators'] > 0
    assert found['text only']['projecting_operators'] == 0
    assert found['two pictures']['device_batches'] == 3
    assert found['all compressed']['tiles_full'] == 0
    for one in found.values():
        packed = one['prefill_steps'] if one['visual_tokens'] else 0  # once a step, by the engine
        projected = 2 if one['visual_tokens'] else 0  # pixel_shuffle and pack, once a prompt of so few tiles
        per_batch = 27  # of four rounds of pooling and nine layers of the gate
        assert one['kernel_operations'] == packed + projected + per_batch * one['device_batches']
        # A pooling of few tiles is split between programs, and merged by another launch.
        assert one['kernel_launches'] == one['kernel_operations'] + 4 * one['device_batches']


def test_a_difference_is_shown(committed):
    changed = copy.deepcopy(committed)
    changed['requests']['one picture']['prefill_steps'] += 1
    changed['requests']['one picture']['encoding_operators'] += 7
    del changed['requests']['text only']
    rows = {(row.counter, row.request): row[2:] for row in counters.differences(committed, changed)}
    was = committed['requests']['one picture']['prefill_steps']
    assert rows['prefill_steps', 'one picture'] == (was, was + 1)
    assert rows['prompt_tokens', 'text only'] == (committed['requests']['text only']['prompt_tokens'], None)
    assert ('encoding_operators', 'one picture') in rows
    assert not counters.differences(committed, committed)
    found, text = report(committed, changed)
    assert found and 'prefill_steps' in text and '--update' in text


def test_operators_are_compared_with_the_same_torch_only(committed):
    changed = copy.deepcopy(committed) | {'torch': '0.1'}
    changed['requests']['one picture']['encoding_operators'] += 7
    found, text = report(committed, changed)
    assert not found and f'with torch {committed["torch"]}, not 0.1: they are not compared' in text
    changed['requests']['one picture']['tiles_encoded'] += 1
    assert [row.counter for row in counters.differences(committed, changed)] == ['tiles_encoded']


def test_operators_that_compute_are_counted():
    x = torch.randn(4, 6)
    with torch.inference_mode(), counters.Operators() as operators:
        y = torch.empty(6, 4)
        z = x.transpose(0, 1).reshape(3, 8)  # a copy
        y.copy_(x.T)
    assert operators.count == 2
    assert z.shape == (3, 8)
    with counters.Operators() as operators:
        torch.nn.functional.linear(x, x).view(2, 8)
    assert operators.count == 1  # the product; linear itself is made of it and of views


def test_kernel_launches_are_counted(monkeypatch):
    rows, out = torch.ones(3, 16), torch.zeros(6, 16)
    with counters.counted_kernels() as counts, counters.Operators() as operators:
        pack.pack(out, [rows, rows], [0, 3])
    assert counts == {'kernel_operations': 1, 'kernel_launches': 1}
    assert operators.count == 2 and out.eq(1).all()  # what ran is the reference, and only that was counted

    launch = pack.pack_triton
    monkeypatch.setattr(pack, 'pack_triton', lambda *arguments: (launch(*arguments), launch(*arguments)))
    with counters.counted_kernels() as counts:
        pack.pack(out, [rows], [0])
        pack.pack(out, [], [])
    assert counts == {'kernel_operations': 1, 'kernel_launches': 2}
