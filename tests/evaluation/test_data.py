"""Data sets in VLMEvalKit's form, whole and malformed."""

import base64
import csv

import pytest

from lmdeploy_vico.evaluation import EvaluationError
from lmdeploy_vico.evaluation.data import read

PICTURE = base64.b64encode(bytes(range(120))).decode()
OTHER = base64.b64encode(bytes(range(100, 220))).decode()


@pytest.fixture
def written(tmp_path):
    """Writes rows to a data set's file."""

    def write(*rows, name='data.tsv', columns=None):
        path = tmp_path / name
        with path.open('w', newline='') as file:
            writer = csv.DictWriter(file, columns or list(rows[0]), delimiter='\t')
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


def row(index='1', **fields):
    return {'index': index, 'question': 'What?', 'answer': 'this', **fields}


def test_all_columns(written, tmp_path):
    (tmp_path / 'clip.mp4').write_bytes(b'video')
    path = written(
        row(image=PICTURE, A='yes', B='no', C='', hint='Look', category='one', video='clip', subtitles='Hello'),
        name='MyData.tsv',
    )
    data = read(path)
    [one] = data.questions
    assert data.name == 'MyData'
    assert one.pictures == (PICTURE,) and one.choices == {'A': 'yes', 'B': 'no'}
    assert (one.hint, one.category, one.subtitles, one.video) == ('Look', 'one', 'Hello', tmp_path / 'clip.mp4')


def test_pictures_of_another_row_and_several(written):
    data = read(
        written(
            row('1', image=PICTURE),
            row('2', image='1'),
            row('3', image=f"['{PICTURE}', '{OTHER}']"),
            row('4', image=''),
        )
    )
    assert [question.pictures for question in data.questions] == [(PICTURE,), (PICTURE,), (PICTURE, OTHER), ()]
    # What is asked about one picture is judged together where a rule says so.
    assert data.questions[1].group == data.questions[0].group != data.questions[2].group


def test_a_picture_that_is_written_twice_is_one(written):
    [one, same, other] = read(
        written(row('1', image=PICTURE), row('2', image=PICTURE), row('3', image=OTHER))
    ).questions
    assert one.group == same.group != other.group


def test_the_shape_of_video_mme(written, tmp_path):
    for folder in ('video', 'subtitle'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'video' / 'x1.mp4').write_bytes(b'video')
    subtitles = '\ufeff1\n00:00:01,000 --> 00:00:02,500\nHello\nthere.\n\n2\n00:00:03,000 --> 00:00:04,000\n42\n'
    (tmp_path / 'subtitle' / 'x1.srt').write_text(subtitles, encoding='utf-8')
    fields = {'video': 'x1', 'video_path': './video/x1.mp4', 'candidates': "['A. Apples.', 'B. Boats.']"}
    [said, silent] = read(
        written(
            row('1', subtitle_path='./subtitle/x1.srt', **fields), row('2', subtitle_path='./subtitle/x2.srt', **fields)
        )
    ).questions
    assert said.video == silent.video == tmp_path / 'video' / 'x1.mp4'
    assert said.choices == {'A': 'Apples.', 'B': 'Boats.'}
    assert (said.subtitles, silent.subtitles) == ('Hello\nthere.\n42', '')


def test_pictures_in_files(written, tmp_path):
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'pictures' / 'one.png').write_bytes(b'png')
    (tmp_path / 'two.png').write_bytes(b'other')
    path = written(row('1', image_path='pictures/one.png'), row('2', image_path="['pictures/one.png', 'two.png']"))
    encoded = [base64.b64encode(data).decode() for data in (b'png', b'other')]
    assert [question.pictures for question in read(path).questions] == [(encoded[0],), tuple(encoded)]


def test_several_answers(written):
    cells = "['a', 'b']", '[unclear', '[{[]: 1}]', '[not Python]'
    questions = read(written(*(row(str(number), answer=cell) for number, cell in enumerate(cells)))).questions
    assert [list(question.answers) for question in questions] == [['a', 'b'], *([cell] for cell in cells[1:])]


@pytest.mark.parametrize(
    'rows, message',
    [
        ([{'index': '1', 'question': 'What?'}], "data.tsv: the column 'answer' is missing"),
        ([row(image=PICTURE[:-3] + '?!=')], 'data.tsv, row 2: "image" is not base64'),
        ([row(image=PICTURE), row('2', image='7')], 'row 3: "image" refers to the row with index \'7\', which is not'),
        (
            [row(image='2'), row('2', image='1')],
            'row 2: "image" refers to the row with index \'2\', which has no picture',
        ),
        ([row(), row()], "row 3: the index '1' is that of row 2 too"),
        ([row(image_path='nowhere.png')], 'row 2: the picture nowhere.png cannot be read: No such file'),
        ([row(video='nothing')], 'row 2: there is no video nothing beside the file'),
        ([row(), row('2', answer='')], "row 3: 'answer' is empty"),
        ([row(answer='[]')], 'row 2: the list of answers is empty'),
        ([row(image='[]')], 'row 2: the list of pictures is empty'),
    ],
)
def test_malformed(written, rows, message):
    with pytest.raises(EvaluationError) as caught:
        read(written(*rows))
    assert str(caught.value).startswith('data.tsv')
    assert message in str(caught.value)


def test_other_files(tmp_path):
    with pytest.raises(EvaluationError, match='cannot be read: No such file'):
        read(tmp_path / 'missing.tsv')
    path = tmp_path / 'binary.tsv'
    path.write_bytes(b'\xff\xfe\0\0')
    with pytest.raises(EvaluationError, match=r'binary.tsv, row 2: this is not a tab-separated file in UTF-8'):
        read(path)
    path.write_text('index\tquestion\tanswer\n1\ta\tb\n2\t"a\tb\n3\ta\tb\n')
    with pytest.raises(EvaluationError, match='row 3: this is not .* quotation mark'):
        read(path)
    path.write_text('index\tquestion\tanswer\n1\ta\tb\n', encoding='utf-8-sig')  # as spreadsheets write it
    assert [question.index for question in read(path).questions] == ['1']
    path.write_text('index\tquestion\tanswer\n1\ta\n')
    with pytest.raises(EvaluationError, match="row 2: 'answer' is empty"):
        read(path)
    path.write_text('index\tquestion\tanswer\n')
    with pytest.raises(EvaluationError, match='has no questions'):
        read(path)
    path.write_text('index\tquestion\tanswer\n1\ta\tb\tc\n')
    with pytest.raises(EvaluationError, match='row 2: there are more cells than columns'):
        read(path)
