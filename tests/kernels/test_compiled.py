"""Every specialisation that the models use, compiled for an A100, an L40S and an H200, against the committed table.

What a kernel takes depends on the compiler: under another Triton than the table's, nothing may exceed the chip, and the
rest is printed (``-rP``) but not judged.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / 'benchmarks' / 'results' / 'kernel-resources.json'
REGISTERS = 65536  # of 32 bits, that the threads of one program share
SHARED_MEMORY = {'sm_80': 163 * 1024, 'sm_89': 99 * 1024, 'sm_90': 227 * 1024}  # bytes that one program may have
WITH_DOTS = {'pool_kernel', 'logits_kernel', 'weighted_sum_kernel', 'linear_kernel'}
UPDATE = 'make kernel-resources'
IDENTITY = ('chip', 'kernel', 'types', 'constants', 'aligned', 'warps')

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    # In a process of its own, since kernels made for the interpreter cannot be compiled.
    output = tmp_path_factory.mktemp('compiled') / 'resources.json'
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    command = [sys.executable, '-m', 'benchmarks', 'kernel-resources', '--output', output]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    sys.stdout.write(done.stdout)
    return json.loads(output.read_text())


@pytest.fixture(scope='module')
def committed():
    return json.loads(COMMITTED.read_text())


@pytest.fixture
def exact(measured, committed):
    """The rows, where the table's own compiler made them."""
    if measured['triton'] != committed['triton']:
        pytest.skip(f'the table was made by Triton {committed["triton"]}, this is {measured["triton"]}')
    return measured['rows']


def identity(row):
    return ' '.join(str(row[name]) for name in IDENTITY)


def test_nothing_exceeds_the_chip(measured):
    assert [identity(row) for row in measured['rows'] if row['shared_memory'] > SHARED_MEMORY[row['chip']]] == []
    assert [identity(row) for row in measured['rows'] if row['registers'] * row['warps'] * 32 > REGISTERS] == []


def test_the_table_has_every_specialisation(measured, committed):
    known, now = (sorted(map(identity, table['rows'])) for table in (committed, measured))
    assert now == known, f'other specialisations: run {UPDATE}'


def test_nothing_spills(exact):
    assert [identity(row) for row in exact if row['spills'] or row['stack']] == []


def test_dots_are_matrix_instructions(exact):
    rows = [row for row in exact if row['kernel'] in WITH_DOTS]
    assert {row['kernel'] for row in rows} == WITH_DOTS
    assert [identity(row) for row in rows if not row['matrix_instructions']] == []


def test_loops_over_large_operands_copy_asynchronously(exact):
    # But for the key projection by head, whose 64 inputs are a single step.
    rows = [row for row in exact if row['kernel'] in WITH_DOTS and 'stride_wn=1' not in row['constants']]
    assert [identity(row) for row in rows if not row['async_copies']] == []


def test_bulk_accesses_are_wide(exact):
    # Narrow ones are for single values: statistics, biases, addresses. Rows of 200 values are not aligned to 16.
    rows = [row for row in exact if row['kernel'] != 'merge_kernel' and 'K=200' not in row['constants']]
    assert [identity(row) for row in rows if row['narrow_accesses'] >= row['wide_accesses']] == []


def test_nothing_grows_over_the_committed_table(exact, committed):
    known = {identity(row): row for row in committed['rows']}
    grown = [
        f'{identity(row)}: {name} {known[identity(row)][name]} -> {row[name]}'
        for row in exact
        for name in ('registers', 'shared_memory', 'narrow_accesses')
        if row[name] > known[identity(row)][name]
    ]
    assert grown == [], f'if this is meant, run {UPDATE}'
