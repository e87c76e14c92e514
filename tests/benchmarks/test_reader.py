"""The reader's tables: intervals over pictures, equal numbers of tiles by lot, and what a table may not mix."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reader.asking import compressed, tiles
from benchmarks.reader.report import markdown
from benchmarks.reader.run import RESULTS, Set, ablation, documents, lots, table
from benchmarks.reader.scores import calibrate
from benchmarks.reader.statistics import Resampling, right
from lmdeploy_vico.evaluation.answers import Answer
from lmdeploy_vico.evaluation.data import DataSet, Question
from lmdeploy_vico.reader.shipped import write_reader


def question(number, group=0, kind='fine'):
    return Question(str(number), 'Code of A?', '1234', category=kind, group=str(group))


def answer(number, text='1234', full=4, small=0, compression='none'):
    tokens = 256 * (full - small) + 64 * small
    return Answer('documents', str(number), compression, text, 20 + tokens, tokens)


def test_tiles_are_counted_by_tokens():
    none, some = answer(0), answer(0, small=3, compression='auto')
    assert (tiles(none), compressed(some, none), compressed(none, none)) == (4, 3, 0)


def test_intervals_are_over_pictures():
    """Ten questions about each of eight pictures, right or wrong together: as unsure as eight questions."""
    together = [question(number, number // 10) for number in range(80)]
    apart = [question(number, number) for number in range(80)]
    hits = np.repeat([1.0, 0, 1, 1, 0, 1, 1, 1], 10)
    wide, narrow = Resampling(together).mean(hits), Resampling(apart).mean(hits)
    assert wide.value == narrow.value == pytest.approx(75)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert Resampling(apart).ratio(hits, hits).as_json() == [100.0, 100.0, 100.0]


def test_only_the_whole_answer_is_right():
    questions = [question(number) for number in range(3)]
    said = {'0': answer(0), '1': answer(1, '123'), '2': answer(2, ' 1234\n')}
    assert right(questions, said).tolist() == [1, 0, 1]


def test_as_many_tiles_by_lot():
    data = DataSet('documents', [question(0), question(1)])
    answers = {
        'none': {'0': answer(0), '1': answer(1, full=6)},
        'auto': {'0': answer(0, small=1), '1': answer(1, full=6, small=5)},
    }
    assert lots(data, answers) == {'0': 'random:0.250000', '1': 'random:0.833333'}


def everything(questions, **small):
    ways = {'none': 0, 'auto': 2, 'random': 2, 'image': 4, 'all': 4, 'vanilla, auto': 2, 'vanilla, none': 0} | small
    return {
        way: {
            one.index: answer(one.index, '1234' if way != 'random' or int(one.index) % 2 else '', small=count)
            for one in questions
        }
        for way, count in ways.items()
    }


def test_differences_are_paired():
    questions = [question(number, number) for number in range(40)]
    found = ablation(questions, everything(questions))
    assert found['differences in points']['auto - random'][0] == 50
    assert found['differences in points']['auto - all'] == [0, 0, 0]
    assert found['lines']['auto']['compressed tiles'] == 50


def test_other_numbers_of_tiles_are_no_comparison():
    questions = [question(number, number) for number in range(4)]
    with pytest.raises(AssertionError, match='prompt by prompt'):
        ablation(questions, everything(questions, random=3))


def test_images_are_compressed_whole_as_often_as_tiles_are(tmp_path):
    """The threshold found is one that the routing rule itself turns into the share that is wanted, as far as it can."""
    write_reader(tmp_path / 'reader')
    data = documents(tmp_path, 'few', Set(31, (1, 3, 5)), 24)
    found = calibrate(tmp_path / 'reader', data)
    assert found.pictures == len({one.group for one in data.questions}) > 5
    assert 0.2 < found.wanted < 0.9 and abs(found.share - found.wanted) < 0.25
    assert 0 < found.threshold < 1
    everything = calibrate(tmp_path / 'reader', DataSet('one', data.questions[:1]))
    assert everything.share in (0, 1), 'one picture is compressed, or it is not'


def test_a_table_has_a_line_for_each_kind():
    questions = [question(0), question(1, 1, 'shape')]
    answers = {
        way: {one.index: dataclasses.replace(answer(one.index, small=small), compression=way) for one in questions}
        for way, small in (('none', 0), ('all', 4))
    }
    found = table(questions, answers)
    assert list(found) == ['all kinds', 'fine', 'shape']
    assert found['shape']['all'] == {
        'questions': 1, 'right': [100.0] * 3, 'retained': [100.0] * 3, 'lost points': [0.0] * 3,
        'compressed tiles': 100.0, 'prompt tokens': 276,
    }  # fmt: skip


def test_the_documentation_has_the_committed_tables():
    tables = markdown(json.loads(RESULTS.read_text(encoding='utf-8')))
    assert tables in Path('docs/reader.md').read_text(encoding='utf-8'), 'python -m benchmarks.reader.report'
