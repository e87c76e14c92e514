"""InternVL's files: what is read, and what is refused by file and line."""

import json

import pytest
from training.made import SAMPLES, gpt, human, write_lines

from lmdeploy_vico.training.data.records import DataError, Records, Turn


def test_samples_are_read(data):
    records = Records(data)
    assert len(records) == 4
    assert [len(records[i].images) for i in range(4)] == [1, 1, 2, 0]
    assert records[0].images == (data.parent / 'cup.png',)
    assert records[0].place == f'{data}, line 1'
    assert records[2].turns[0] == Turn('system', 'You are terse.')
    assert [turn.role for turn in records[2].turns[1:]] == ['user', 'assistant', 'user', 'assistant']


def test_an_image_that_has_no_place_comes_before_the_question(data):
    path = write_lines(data.parent / 'one.jsonl', [{'image': 'cup.png', 'conversations': [human('What?'), gpt('It.')]}])
    assert Records(path)[0].turns[0].text == '<image>\nWhat?'


def test_a_meta_file_repeats(data):
    (data.parent / 'more').mkdir(exist_ok=True)
    write_lines(data.parent / 'more' / 'more.jsonl', SAMPLES[:2])
    meta = {
        'all': {'root': '.', 'annotation': 'train.jsonl', 'repeat_time': 1},
        'more': {'root': '.', 'annotation': 'more/more.jsonl', 'repeat_time': 2.5},
    }
    path = data.parent / 'meta.json'
    path.write_text(json.dumps(meta))
    records = Records(path)
    assert len(records) == 4 + 2 * 2 + 1
    places = [records[i].place for i in range(len(records))]
    assert places[:4] == [f'{data}, line {i}' for i in range(1, 5)]
    assert len(set(places)) == 6
    assert len(records.distinct()) == 6
    assert [Records(path)[i].place for i in range(9)] == places


BAD = {
    'no JSON': ('{"image": ', 'this is not JSON'),
    'a list': ([], 'a sample is a JSON object'),
    'a missing image': (
        {'image': 'gone.png', 'conversations': [human('<image>'), gpt('a')]},
        'gone.png does not exist',
    ),
    'an image that is no path': ({'image': [3], 'conversations': [human('<image>'), gpt('a')]}, 'a path or a list'),
    'too few <image>': (
        {'image': ['cup.png'] * 2, 'conversations': [human('<image>'), gpt('a')]},
        'have 1 <image> for 2 images',
    ),
    'too many <image>': (
        {'image': 'cup.png', 'conversations': [human('<image> <image>'), gpt('a')]},
        '2 <image> for 1',
    ),
    'an <image> of nothing': ({'conversations': [human('<image>'), gpt('a')]}, 'have 1 <image> for 0 images'),
    'an empty response': ({'conversations': [human('Hello'), gpt(' \n')]}, 'the response of "gpt" is empty'),
    'no response': ({'conversations': [human('Hello')]}, 'the last of "gpt"'),
    'two questions': ({'conversations': [human('a'), human('b'), gpt('c')]}, 'in turn'),
    'no conversation': ({'image': 'cup.png'}, '"conversations" must be a list'),
    'an unknown side': ({'conversations': [{'from': 'bot', 'value': 'a'}]}, 'a turn is'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_samples_are_named_by_file_and_line(data, name):
    sample, said = BAD[name]
    path = data.parent / 'bad.jsonl'
    line = sample if isinstance(sample, str) else json.dumps(sample)
    path.write_text(f'{json.dumps(SAMPLES[0])}\n\n{line}\n')
    with pytest.raises(DataError) as error:
        Records(path)[1]
    assert str(error.value).startswith(f'{path}, line 3: ')
    assert said in str(error.value)


@pytest.mark.parametrize(
    'content, said',
    [
        ('[]', 'is not a meta file'),
        ('{"a": {}}', 'a needs "annotation"'),
        ('{"a": {"annotation": "gone.jsonl"}}', 'gone.jsonl, does not exist'),
        ('{"a": {"annotation": "train.jsonl", "repeat_time": -1}}', 'repeat_time of a must be a number from 0'),
        ('{"a": {"annotation": "train.jsonl", "repeat_time": 0}}', 'has no samples'),
    ],
)
def test_bad_meta_files(data, content, said):
    path = data.parent / 'bad.json'
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        Records(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r'gone\.jsonl does not exist'):
        Records(tmp_path / 'gone.jsonl')


def test_keys_that_would_change_the_data_are_refused(tmp_path):
    write_lines(tmp_path / 'a.jsonl', SAMPLES)
    meta = tmp_path / 'meta.json'
    meta.write_text(json.dumps({'set': {'root': '.', 'annotation': 'a.jsonl', 'max_dynamic_patch': 6}}))
    with pytest.raises(DataError, match='max_dynamic_patch of set is not supported'):
        Records(meta)
