"""The data set of documents, and its command."""

import base64
import io
import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lmdeploy_vico.cli import main
from lmdeploy_vico.evaluation.data import read
from lmdeploy_vico.reader.documents.export import pages, pick, write_questions


def picture(question):
    [encoded] = question.pictures
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def test_eval_reads_what_is_written(tmp_path):
    path = tmp_path / 'documents.tsv'
    count = write_questions(path, seed=3, count=25)
    questions = read(path).questions
    assert len(questions) == 25
    drawn = pages(3, ['fine', 'medium', 'shape', 'photo'], [1, 3, 5])
    expected = list(itertools.islice(((question, page) for page in drawn for question in page.questions), 25))
    assert count == len({id(page) for _, page in expected})
    for found, (question, page) in zip(questions, expected, strict=True):
        assert (found.text, found.answer, found.category) == (question.text, question.answer, question.kind)
        assert np.array_equal(picture(found), page.pixels)


def test_few_questions_about_each_kind(tmp_path):
    """They are spread over the entries, and the first of a longer file are those of a shorter one."""
    long, short = (tmp_path / f'{count}.tsv' for count in (60, 20))
    pictures = write_questions(long, seed=3, count=60, tiles=(3, 5), per_kind=2)
    write_questions(short, seed=3, count=20, tiles=(3, 5), per_kind=2)
    questions = read(long).questions
    often = Counter((question.group, question.category) for question in questions)
    assert max(often.values()) == 2 and len({group for group, _ in often}) == pictures
    drawn = list(itertools.islice(pages(3, ['fine', 'medium', 'shape', 'photo'], [3, 5]), 2 * pictures))
    places = set()
    for page in drawn:
        fine = [question.text for question in page.questions if question.kind == 'fine']
        places |= {
            fine.index(question.text)
            for question in pick(np.random.default_rng(5), page.questions, 2)
            if question.kind == 'fine'
        }
    assert len(places) > 4, 'not only the first entries'
    first = [(one.text, one.answer, one.pictures) for one in read(short).questions[:-5]]
    assert first == [(one.text, one.answer, one.pictures) for one in questions[: len(first)]]


def test_the_command(tmp_path, capsys):
    path = tmp_path / 'fine.tsv'
    assert main(['documents', str(path), '--count', '7', '--kinds', 'fine', '--tiles', '2']) == 0
    questions = read(path).questions
    assert {question.category for question in questions} == {'fine'} and picture(questions[0]).shape == (448, 896, 3)
    assert '7 questions about' in capsys.readouterr().out


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (['--seed', '1000'], '--seed: it has to be from 0 to 999'),
        (['--kinds', 'tiny'], "--kinds: 'tiny' is none of fine, medium, shape, photo."),
        (['--tiles', '7'], '--tiles: 7 is none of 1, 2, 3, 4, 5, 6.'),
        (['--kinds', 'shape', '--tiles', '2'], 'have no question with one answer'),
        (['--count', '0'], '--count: at least 1 question.'),
        (['--per-kind', '0'], '--per-kind: at least 1 question.'),
    ],
)
def test_refused(tmp_path, capsys, arguments, sentence):
    assert main(['documents', str(tmp_path / 'x.tsv'), *arguments]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / 'x.tsv').exists()


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    assert main(['documents', str(tmp_path / 'missing' / 'x.tsv'), '--count', '1']) == 1
    assert 'cannot be written: No such file or directory' in capsys.readouterr().err
