"""Ratios that were measured on a CPU in three runs, against what the model says of them."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest

from benchmarks import RESULTS
from benchmarks.gates.targets import prefill_flop
from lmdeploy_vico.planning import constants
from lmdeploy_vico.planning.calibration import cpu
from lmdeploy_vico.planning.calibration.cpu import (
    FITTED_ROW,
    KINDS,
    SIZE,
    cpu_ratios,
    fit_rates,
    fit_request_rates,
    flops,
)
from lmdeploy_vico.planning.deployment import Workload

DOCUMENT = Path(__file__).parents[2] / 'docs' / 'planning.md'
RUNS = [json.loads((RESULTS / f'llm-cpu-{number}.json').read_text()) for number in (1, 2, 3)]


def test_the_numbers_are_those_of_the_files():
    for run, seconds, rates in zip(RUNS, constants.CPU_SECONDS, constants.CPU_REQUESTS_PER_SECOND, strict=True):
        assert run['complete'] and run['environment']['device'] == 'cpu'
        cells = {(cell['text_tokens'], cell['token_compression']): cell for cell in run['cells']}
        assert set(cells) == set(seconds) == set(rates) == set(KINDS)
        for kind, cell in cells.items():
            assert cell['mode'] == 'llm' and not cell['failed'] and not cell['error'] and not cell['cached_tokens']
            used = cell['processor_seconds_per_request']['engine']
            assert used == pytest.approx(seconds[kind], abs=5e-5)
            assert cell['request_throughput'] == pytest.approx(rates[kind], abs=5e-4)
            tokens = Workload(run['arguments']['tiles'], *kind, images=False).tokens
            assert cell['input_tokens_per_request'] == pytest.approx(tokens, abs=8), 'as many as tiles allow'
            assert cell['achieved_token_compression'] == pytest.approx(kind[1], abs=0.005)


def test_flop_are_those_of_the_gates():
    dense = replace(SIZE, experts=0)
    for text, share in KINDS:
        assert sum(flops(text, share)) == prefill_flop(dense, Workload(10, text, share, images=False).tokens)


def test_the_fit_is_the_least_there_is_and_sees_no_row_with_512_text_tokens(monkeypatch):
    def cost(rates):
        kinds = [kind for kind in KINDS if kind[0] == FITTED_ROW]
        means = {kind: mean(run[kind] for run in constants.CPU_SECONDS) for kind in kinds}
        return sum((rates.seconds(*kind) / means[kind] - 1) ** 2 for kind in kinds)

    fitted = fit_rates()
    for products, attention in ((1.05, 1), (0.95, 1), (1, 1.2), (1, 0.8)):
        assert cost(cpu.CpuRates(fitted.products * products, fitted.attention * attention)) > cost(fitted)
    wrong = tuple({kind: 9.0 if kind[0] != FITTED_ROW else run[kind] for kind in KINDS} for run in cpu.CPU_SECONDS)
    monkeypatch.setattr(cpu, 'CPU_SECONDS', wrong)
    assert fit_rates() == fitted


def outside(measure):
    """The ratios that are not within the spread of the three runs by a measure."""
    ours = {'processor': 'ours', 'requests': 'ours_by_requests'}[measure]
    return {
        (ratio.text_tokens, ratio.compression)
        for ratio in cpu_ratios()
        if not min(getattr(ratio, measure)) <= getattr(ratio, ours) <= max(getattr(ratio, measure))
    }


def test_which_ratios_are_within_the_spread_of_three_runs():
    """What docs/planning.md says of them, those that are not included."""
    assert outside('requests') == set()
    assert outside('processor') == {(64, 0.75)}
    [one] = [ratio for ratio in cpu_ratios() if (ratio.text_tokens, ratio.compression) == (64, 0.75)]
    assert 0.9992 * min(one.processor) < one.ours < min(one.processor)


def test_all_ratios_are_within_the_interval_of_the_mean_of_three_runs():
    student = 4.303  # 97.5th percentile of Student's t, two degrees of freedom
    for ratio in cpu_ratios():
        assert abs(ratio.ours - mean(ratio.processor)) < student * stdev(ratio.processor) / math.sqrt(len(RUNS))


def test_a_request_takes_a_little_besides_its_prefill(monkeypatch):
    fitted = fit_request_rates()
    assert 0.005 < fitted.request < 0.01
    wrong = tuple(
        {kind: 9.0 if kind[0] != FITTED_ROW else run[kind] for kind in KINDS} for run in cpu.CPU_REQUESTS_PER_SECOND
    )
    monkeypatch.setattr(cpu, 'CPU_REQUESTS_PER_SECOND', wrong)
    assert fit_request_rates() == fitted, 'no row with 512 text tokens is seen'


def test_one_rate_for_products_and_attention_is_not_enough():
    for ratio in cpu_ratios():
        assert ratio.flops > max(ratio.processor)
        assert abs(ratio.error) < ratio.flops / mean(ratio.processor) - 1
    rates = fit_rates()
    assert 12 < rates.attention / rates.products < 17


def test_the_document_has_these_ratios():
    spread = r'([\d.]+) to ([\d.]+)'
    number = r'([\d.]+)'
    columns = (r'(\d+)', r'(\d+) %', spread, number, spread, number, r'([+-][\d.]+) %', number)
    separator = r' \| '
    row = re.compile(rf'^\| {separator.join(columns)} \|$', re.MULTILINE)
    written = [match.groups() for match in row.finditer(DOCUMENT.read_text())]
    assert written == [
        (
            str(ratio.text_tokens),
            f'{100 * ratio.compression:.0f}',
            *(f'{one:.2f}' for one in (min(ratio.requests), max(ratio.requests), ratio.ours_by_requests)),
            *(f'{one:.2f}' for one in (min(ratio.processor), max(ratio.processor), ratio.ours)),
            f'{100 * ratio.error:+.1f}',
            f'{ratio.flops:.2f}',
        )
        for ratio in cpu_ratios()
    ]
