"""`lmdeploy-vico eval` of a server with the threshold that `calibrate` has found: the score that it foretold."""

import json
import shlex

import pytest
from PIL import Image

from lmdeploy_vico.cli import main
from lmdeploy_vico.reader.demo import documents
from lmdeploy_vico.reader.documents.export import write_questions

pytestmark = [pytest.mark.quality, pytest.mark.server]

QUESTIONS = 60


def test_the_score_is_the_one_that_was_foretold(reader, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one in documents():
        Image.fromarray(one.pixels).save(tmp_path / f'{one.name}.png')
    write_questions(tmp_path / 'questions.tsv', seed=41, count=QUESTIONS, tiles=(3, 5), per_kind=2)
    asked = ['--instruction', '', '--max-tokens', '8']
    given = ['--images', str(tmp_path), '--target-compression', '0.4', '--eval', 'questions.tsv', '--json', *asked]
    assert main(['calibrate', '--model', str(reader), *given]) == 0
    found = json.loads(capsys.readouterr().out)
    [foretold] = [one for one in found['scores'] if one['absolute_threshold'] == found['chosen']['absolute_threshold']]
    assert 0 < foretold['compressed_tiles'] < found['most']['compressed_tiles']
    _, _, _, model, *options = shlex.split(found['command'])
    arguments = ['--model', model, '--data', 'questions.tsv', '--compression', 'auto', *asked]
    assert main(['eval', *arguments, '--output-file', 'evaluation.json', '--', *options]) == 0
    lines = json.loads((tmp_path / 'evaluation.json').read_text())['results']
    [auto] = [one for one in lines if one['compression'] == 'auto' and one['category'] is None]
    assert auto['score'] == foretold['score'] and auto['retention'] == foretold['retention'][0]
    assert auto['compressed_tiles'] / auto['tiles'] == pytest.approx(foretold['compressed_tiles'], abs=1e-4)
