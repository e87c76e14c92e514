"""What becomes of measurements: sums, speed-ups, the breakdown, tables, sentences, files."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.client import Outcome, Round
from lmdeploy_vico.bench.report import table
from lmdeploy_vico.bench.report.breakdown import Breakdown, difference, parse_metrics
from lmdeploy_vico.bench.report.paper import paper_model, paper_speedup
from lmdeploy_vico.bench.report.results import CellResult, OutputFile
from lmdeploy_vico.bench.workload.requests import AUTO, FLASH, IMAGE, LLM, OURS, Cell

NONE, HALF = Cell(LLM, OURS, 64, 0.0), Cell(LLM, OURS, 64, 0.5)
BASELINE = Cell(IMAGE, FLASH, 64, None)


def measured(cell: Cell, seconds: float, ttfts: list[float], image_tokens: int | None, **added: float) -> CellResult:
    result = CellResult(cell, tiles=10)
    result.overhead = 16
    outcomes = [Outcome(ttft, 80 + (image_tokens or 2560), image_tokens, status=200) for ttft in ttfts]
    result.add(Round(seconds, outcomes, False), added, {'api': 0.5, 'engine': 2.0})
    return result


def test_a_cell_in_the_names_of_other_benchmarks():
    result = measured(NONE, 2.0, [0.1, 0.2, 0.3, 0.4], 2560)
    result.add(Round(1.0, [Outcome(0.5, 2640, 2560, 7), Outcome(error='HTTP 503: busy', status=503)], False), {}, {})
    entry = result.as_json(1.0, None)
    wanted = {
        'duration': 3.0,
        'completed': 5,
        'failed': 1,
        'request_throughput': 5 / 3,
        'input_throughput': 5 * 2640 / 3,
        'total_input_tokens': 5 * 2640,
        'total_input_text_tokens': 5 * 80,
        'total_input_vision_tokens': 5 * 2560,
        'mean_ttft_ms': 300,
        'median_ttft_ms': 300,
        'p90_ttft_ms': 460,
        'p99_ttft_ms': 496,
        'user_text_tokens_per_request': 64,
        'kv_blocks_per_request': 42,
        'achieved_token_compression': 0,
        'cached_tokens': 7,
    }
    assert {name: pytest.approx(entry[name]) for name in wanted} == wanted
    assert entry['errors'] == {'HTTP 503: busy': 1}
    assert entry['round_durations'] == [2.0, 1.0]
    assert entry['processor_seconds_per_request'] == {'api': 0.5 / 5, 'engine': 2.0 / 5}


def test_nothing_measured_is_json_all_the_same():
    entry = CellResult(NONE, 10).as_json(math.nan, None)
    assert entry['mean_ttft_ms'] is None
    assert entry['speedup'] is None
    json.dumps(entry, allow_nan=False)


def test_a_server_without_image_tokens_has_256_a_tile():
    result = measured(BASELINE, 1.0, [0.1], None)
    assert result.as_json(1.0, None)['total_input_vision_tokens'] == 2560
    assert result.achieved_compression == 0


def test_speedup_is_against_no_compression_of_the_same_mode_and_text():
    other = Cell(LLM, OURS, 512, 0.5)
    results = {
        NONE: measured(NONE, 2.0, [0.1] * 4, 2560),
        HALF: measured(HALF, 1.0, [0.1] * 4, 1280),
        other: measured(other, 1.0, [0.1] * 4, 1280),
    }
    assert table.speedup(results, HALF) == 2
    assert math.isnan(table.speedup(results, other))
    assert results[HALF].achieved_compression == 0.5


METRICS = """
# HELP vico:encoder_preprocess_seconds Resizing.
vico:encoder_preprocess_seconds_sum 1.5
vico:encoder_preprocess_seconds_bucket{le="1.0"} 3.0
vico:tiles_total{resolution="compressed"} 3.0
vico:tiles_total{resolution="full"} 4.0
process_cpu_seconds_total 9.0
lmdeploy:request_prefill_time_seconds_sum{engine="0",model_name="/a b/{c}"} 2e-1
"""


def test_metrics_are_added_up_over_labels():
    values = parse_metrics(METRICS)
    assert values == {
        'vico:encoder_preprocess_seconds_sum': 1.5,
        'vico:tiles_total': 7.0,
        'lmdeploy:request_prefill_time_seconds_sum': 0.2,
    }
    assert difference(values, {'vico:tiles_total': 2.0})['vico:tiles_total'] == 5.0


def added(**vision: float) -> dict[str, float]:
    engine = {'time_to_first_token': 6.0, 'request_queue_time': 1.0, 'request_prefill_time': 4.0}
    values = {f'lmdeploy:{name}_seconds_sum': value for name, value in engine.items()}
    values['lmdeploy:time_to_first_token_seconds_count'] = 10.0
    return values | {f'vico:encoder_{name}_seconds_sum': value for name, value in vision.items()}


def test_the_parts_of_a_request_add_up():
    seconds = added(decode=0.5, queue_wait=3.0, preprocess=0.5, model_forward=1.0)
    parts = Breakdown.of(seconds, 1.2, 10, duration=4.0)
    assert parts.parts() == pytest.approx(
        {
            'decode': 0.05,
            'queue': 0.25,
            'tiling': 0.05,
            'vit': 0.1,
            'hand_over': 0.25,
            'engine_queue': 0.1,
            'prefill': 0.4,
        }
    )
    assert sum(parts.parts().values()) == pytest.approx(1.2)
    assert (parts.vit_busy, parts.tiling_threads) == (0.25, 0.125)


def test_a_server_without_the_plugin_and_one_without_metrics():
    parts = Breakdown.of(added(), 1.2, 10, duration=4.0)
    assert (parts.decode, parts.queue) == (pytest.approx(0.6), 0)
    assert sum(parts.parts().values()) == pytest.approx(1.2)
    assert Breakdown.of({}, 1.2, 10, 4.0) is None


@pytest.mark.parametrize(
    ('vision', 'ttft', 'said'),
    [
        ({}, 0.7, 'prefill, with the wait for it, takes'),
        ({'queue_wait': 9.0, 'preprocess': 0.5, 'model_forward': 3.8}, 2.0, 'the ViT is busy 95%'),
        ({'queue_wait': 9.0, 'preprocess': 4.0, 'model_forward': 0.5}, 2.0, '1.0 threads cut images: preparation'),
        ({'queue_wait': 0.0, 'preprocess': 0.0, 'model_forward': 0.0}, 2.0, 'HTTP and hand-over'),
    ],
)
def test_the_bottleneck_is_named(vision, ttft, said):
    assert said in Breakdown.of(added(**vision), ttft, 10, duration=4.0).bottleneck()


def test_a_speedup_that_is_none_is_explained():
    values = added(queue_wait=9.0, preprocess=0.5, model_forward=0.99)
    results = {
        NONE: measured(NONE, 1.0, [2.0] * 10, 2560, **values),
        HALF: measured(HALF, 1.0, [2.0] * 10, 1280, **values),
    }
    [sentence] = table.sentences(results, 10)
    assert 'compression 50%: compression gives no speed-up (1.00x): the ViT is busy 99%' in sentence
    results[HALF] = measured(HALF, 0.5, [2.0] * 10, 1280, **values)
    assert table.sentences(results, 10) == []


def test_caches_and_failures_are_said():
    result = measured(NONE, 1.0, [0.1] * 10, 2560, **{'vico:embedding_cache_hits_total': 5.0})
    result.add(Round(1.0, [Outcome(0.1, 100, 90, 64), Outcome(error='HTTP 500: no')], False), {}, {})
    said = '\n'.join(table.sentences({NONE: result}, 10))
    assert '5 tiles came from the cache' in said
    assert '64 prompt tokens came from the prefix cache' in said
    assert '1.00x*' in table.speedup_table({NONE: result}, None, 10).columns[3]._cells
    assert '1 requests failed, 1 of them with: HTTP 500: no' in said
    result.error = 'the engine ended'
    assert 'failed: the engine ended' in table.sentences({NONE: result}, 10)[0]


def test_the_table_has_the_papers_numbers_beside_ours():
    auto = Cell(IMAGE, OURS, 64, AUTO)
    reference = Cell(IMAGE, OURS, 64, 0.0)
    results = {
        cell: measured(cell, seconds, [0.1] * 4, tokens)
        for cell, seconds, tokens in (
            (NONE, 2.0, 2560),
            (HALF, 1.0, 1280),
            (reference, 4.0, 2560),
            (auto, 2.0, 1600),
            (BASELINE, 1.0, None),
        )
    }
    console = Console(width=160, record=True, file=io.StringIO())
    table.show(console, results, '8B', 10)
    text = console.export_text()
    rows = [line.split() for line in text.splitlines() if '10 tiles + 64 text tokens' in line]
    assert rows[0][-3:] == ['1.00x', '2.00x', '(1.97)']
    assert rows[1][-2:] == ['1.00x', '2.00x']  # image mode: the paper has none
    assert rows[2][-1:] == ['4.00x']
    assert 'answers are wrong after the first token' in text
    assert "the paper's 8B" in text
    assert '50% (50.0%)' in text
    assert 'auto (37.5%)' in text


@pytest.mark.parametrize(
    ('name', 'model'),
    [
        ('OpenGVLab/InternVL3_5-8B-Flash', '8B'),
        ('OpenGVLab/InternVL3_5-30B-A3B-Flash', '30B'),
        ('OpenGVLab/InternVL3_5-241B-A28B-Flash', '241B'),
        ('OpenGVLab/InternVL3_5-1B-Flash', None),
        ('8Bits', None),
    ],
)
def test_the_papers_model_by_name(name, model):
    assert paper_model(name) == model


def test_the_papers_model_by_config(tmp_path):
    config = {'llm_config': {'hidden_size': 5120, 'num_hidden_layers': 64}}
    folder = tmp_path / 'my-8B'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    assert paper_model(str(folder)) == '38B'
    assert paper_speedup('38B', 10, HALF) == 1.99
    assert paper_speedup('38B', 9, HALF) is None
    assert paper_speedup('38B', 10, Cell(LLM, OURS, 100, 0.5)) is None


def test_output_is_checked_and_replaced_as_a_whole(tmp_path):
    output = OutputFile(tmp_path / 'results.json')
    output.check()
    assert list(tmp_path.iterdir()) == []
    output.write({'complete': False})
    output.write({'complete': True})
    assert json.loads(output.path.read_text()) == {'complete': True}
    assert list(tmp_path.iterdir()) == [output.path]


def test_output_that_cannot_be_written(tmp_path):
    with pytest.raises(BenchError, match='cannot be written: No such file or directory'):
        OutputFile(tmp_path / 'missing' / 'results.json').check()
    with pytest.raises(BenchError, match='a directory or a device'):
        OutputFile(tmp_path).check()
    with pytest.raises(BenchError, match='a directory or a device'):
        OutputFile(Path('/dev/full')).check()


def test_a_full_disk_keeps_the_last_results(tmp_path, monkeypatch):
    output = OutputFile(tmp_path / 'results.json')
    output.write({'round': 1})
    # Every write to /dev/full fails as on a full disk, when the buffer is flushed.
    monkeypatch.setattr(output, '_draft', tmp_path / 'full')
    (tmp_path / 'full').symlink_to('/dev/full')
    with pytest.raises(BenchError, match='No space left on device. It holds the results of an earlier round.'):
        output.write({'round': 2})
    assert json.loads(output.path.read_text()) == {'round': 1}


def test_a_plot(tmp_path):
    results = {NONE: measured(NONE, 2.0, [0.1] * 4, 2560), HALF: measured(HALF, 1.0, [0.1] * 4, 1280)}
    table.draw(tmp_path / 'plot.png', results, '8B', 10, 'title')
    assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(BenchError, match=r'must end in \.png'):
        table.check_plot(Path('plot.pdf'))
    with pytest.raises(BenchError, match='cannot be written'):
        table.check_plot(tmp_path / 'missing' / 'plot.png')
