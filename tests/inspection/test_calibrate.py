"""``lmdeploy-vico calibrate``: pictures and questions in, thresholds and scores out."""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from upstream import Answering, listening
from waiting import HANG

from lmdeploy_vico.cli import main
from lmdeploy_vico.evaluation.data import read
from lmdeploy_vico.inspection.pictures import find_by_kind
from lmdeploy_vico.reader.demo import documents
from lmdeploy_vico.reader.documents.export import write_questions
from lmdeploy_vico.reader.shipped import write_reader


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The reader, two kinds of pictures, and a data set."""
    path = tmp_path_factory.mktemp('calibrate')
    write_reader(path / 'reader')
    for number, one in enumerate(documents()):
        kind = path / 'images' / ('wide' if one.pixels.shape[1] > 1400 else 'small')
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one.pixels).save(kind / f'{number}.png')
    (path / 'images' / 'small' / 'notes.txt').write_text('no picture')
    write_questions(path / 'questions.tsv', seed=5, count=9, tiles=(3,), per_kind=2)
    return path


class Upstream(Answering):
    """Answers rightly, if at most half of the tiles are compressed; knows the right answers by the pictures."""

    asked: list
    right: dict
    broken = 0  # every so many requests, one is refused

    def get(self):
        self.send_json({'data': [{'id': 'stand-in'}]})

    def post(self):
        body = json.loads(self.body())
        picture, question = body['messages'][0]['content']
        compression = body['mm_processor_kwargs']['image']['compression']
        self.asked.append(compression)
        if self.broken and len(self.asked) % self.broken == 0:
            self.send_error(400)
            return
        key = picture['image_url']['url'].partition('base64,')[2], question['text']
        said = self.right[key] if compression == 'none' or compression <= 0.5 else 'wrong'
        usage = {'prompt_tokens': 1040, 'prompt_tokens_details': {'image_tokens': 4 * 256}}
        self.send_json({'choices': [{'message': {'content': said}}], 'usage': usage})


@pytest.fixture
def upstream(folder, monkeypatch):
    questions = read(folder / 'questions.tsv').questions
    monkeypatch.setattr(Upstream, 'asked', [], raising=False)
    monkeypatch.setattr(
        Upstream, 'right', {(one.pictures[0], one.text): one.answer for one in questions}, raising=False
    )
    with listening(Upstream) as url:
        yield url


def given(folder, *more):
    return ['calibrate', '--model', str(folder / 'reader'), '--images', str(folder / 'images'), *map(str, more)]


def test_thresholds_and_the_command(folder, capsys):
    assert main(given(folder, '--json', '--target-compression', '0.4')) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['pictures'] == 7 and set(found['kinds']) == {'small', 'wide'}
    tiles, chosen = found['tiles'], found['chosen']
    assert abs(chosen['compressed_tiles'] - 0.4) * tiles <= 1
    assert chosen['tokens_saved'] == pytest.approx(0.75 * chosen['compressed_tiles'], abs=1e-4)
    overrides = json.loads(found['command'].partition("--hf-overrides '")[2].rstrip("'"))
    assert overrides == {'flash_relative_threshold': 0.0, 'flash_absolute_threshold': chosen['absolute_threshold']}
    # A checkpoint with these thresholds compresses just so many tiles.
    changed = shutil.copytree(folder / 'reader', folder / 'changed', dirs_exist_ok=True)
    config = json.loads((changed / 'config.json').read_text())
    (changed / 'config.json').write_text(json.dumps(config | overrides))
    paths = [str(path) for _, path in find_by_kind(folder / 'images')]
    assert main(['route', *paths, '--model', str(changed), '--json']) == 0
    tokens = [tile['tokens'] for one in json.loads(capsys.readouterr().out)['images'] for tile in one['tiles']]
    assert tokens.count(64) == round(chosen['compressed_tiles'] * tiles)


@pytest.fixture(scope='module')
def photographs(folder, pictures):
    """A folder of photographs that scikit-image ships."""
    path = folder / 'photographs'
    path.mkdir()
    for name in ('astronaut', 'chelsea', 'coffee', 'rocket'):
        pictures[name].save(path / f'{name}.png')
    return path


@pytest.fixture(scope='module')
def scores(folder, photographs):
    """Of each photograph's tiles, as ``route`` reports them."""
    command = [sys.executable, '-m', 'lmdeploy_vico.cli', 'route', photographs, '--model', folder / 'reader', '--json']
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG)
    return [[tile['score'] for tile in image['tiles']] for image in json.loads(done.stdout)['images']]


@pytest.mark.parametrize('target', [0.5, 1.0])
def test_photographs_are_compressed_within_a_tile_of_what_is_possible(folder, photographs, scores, capsys, target):
    """Counted by hand from the scores: with a quantile of 0 a prompt's lowest score is never compressed."""
    tiles = sum(map(len, scores))
    can_be = sum(score > min(of_image) for of_image in scores for score in of_image)
    assert len(scores) == 4 and tiles > 20
    command = ['calibrate', '--model', str(folder / 'reader'), '--images', str(photographs), '--json']
    assert main([*command, '--target-compression', str(target)]) == 0
    chosen = json.loads(capsys.readouterr().out)['chosen']
    assert abs(chosen['compressed_tiles'] * tiles - min(target * tiles, can_be)) <= 1
    threshold = chosen['absolute_threshold']
    by_hand = sum(score > min(of_image) and score >= threshold for of_image in scores for score in of_image)
    assert by_hand == round(chosen['compressed_tiles'] * tiles)


def test_more_than_can_be_is_said(folder, capsys):
    assert main(given(folder, '--target-compression', '0.99')) == 0
    out = capsys.readouterr().out
    assert 'No threshold compresses 99% of these tiles' in out and 'small' in out and 'wide' in out


def asking(folder, upstream, scratch):
    questions = ['--eval', folder / 'questions.tsv', '--instruction', '']
    return [*questions, '--base-url', upstream, '--answers', scratch / 'answers.jsonl']


def test_scores_at_each_threshold(folder, upstream, capsys, tmp_path):
    command = given(folder, '--json', *asking(folder, upstream, tmp_path), '--plot', tmp_path / 'x.png')
    assert main(command) == 0
    scores = json.loads(capsys.readouterr().out)['scores']
    assert len(scores) >= 5
    shares = [one['compressed_tiles'] for one in scores]
    assert shares == sorted(shares) and shares[0] == 0
    assert scores[0]['score'] == 100 and scores[0]['retention'][0] == 100
    assert scores[-1]['score'] < 100, 'prompts of four tiles, three of which are compressed, are answered wrongly'
    assert set(Upstream.asked) <= {'none', 0.25, 0.5, 0.75}
    assert len(Upstream.asked) <= 4 * 9, 'no question is asked twice at the same tiles'
    assert (tmp_path / 'x.png').stat().st_size > 10_000
    asked = len(Upstream.asked)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)['scores'] == scores and len(Upstream.asked) == asked, 'all is known'


@pytest.mark.parametrize(
    'more, sentence',
    [
        (['--images', 'missing'], 'missing is not a folder.'),
        (['--images', 'empty'], 'empty is a folder without pictures'),
        (['--model', 'empty'], 'empty is not a checkpoint directory'),
        (['--eval', 'missing.tsv'], 'missing.tsv'),
        (['--', '--tp', '2'], 'Arguments after -- are for a server that is started here'),
        (['--plot', 'nowhere/x.png'], 'nowhere/x.png cannot be written'),
    ],
)
def test_refused(folder, tmp_path, capsys, monkeypatch, more, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    assert main(given(folder, *more)) == 1
    err = capsys.readouterr().err
    assert sentence in err and 'Traceback' not in err


def test_a_share_is_from_0_to_1(folder, capsys):
    with pytest.raises(SystemExit):
        main(given(folder, '--target-compression', '50'))
    assert 'must be a number from 0 to 1' in capsys.readouterr().err


@pytest.mark.parametrize(
    'every, sentence', [(1, 'requests in a row failed'), (5, 'questions were not answered, the first with')]
)
def test_a_server_that_refuses(folder, upstream, capsys, monkeypatch, tmp_path, every, sentence):
    monkeypatch.setattr(Upstream, 'broken', every)
    assert main(given(folder, *asking(folder, upstream, tmp_path))) == 1
    assert sentence in capsys.readouterr().err
