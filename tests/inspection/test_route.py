"""``lmdeploy-vico route`` against the independent implementation, and what it refuses."""

import json

import numpy as np
import pytest
from parity.reference import Reference
from PIL import Image

from lmdeploy_vico.checkpoints.random import make_tiny_checkpoint
from lmdeploy_vico.cli import main
from lmdeploy_vico.inspection.pictures import find
from lmdeploy_vico.reader.demo import documents
from lmdeploy_vico.reader.shipped import write_reader


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
    path = tmp_path_factory.mktemp('shipped') / 'reader'
    write_reader(path)
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Three documents of one, three and four tiles; one of them lies on its side, as cameras write it."""
    path = tmp_path_factory.mktemp('pictures')
    chosen = [one for one in documents() if one.name in ('one tile', 'list, photographs', 'large type')]
    for number, one in enumerate(chosen):
        image = Image.fromarray(one.pixels)
        if number == 0:
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned by 90 degrees
            image.transpose(Image.Transpose.ROTATE_90).save(path / f'{number}.png', exif=exif)
        else:
            image.save(path / f'{number}.png')
    (path / 'notes.txt').write_text('no picture')
    return path, chosen


def routed(capsys, *arguments):
    assert main(['route', '--json', *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)['images']


@pytest.mark.parametrize('together', [False, True])
@pytest.mark.parametrize('compression', ['auto', '0.5', 'all'])
def test_tiles_scores_and_decisions(reader, folder, capsys, together, compression):
    path, chosen = folder
    found = routed(capsys, path, '--model', reader, '--compression', compression, *(['--together'] if together else []))
    reference = Reference(reader)
    images = [Image.fromarray(one.pixels) for one in chosen]
    wanted = compression if compression in ('auto', 'all') else float(compression)
    prompts = [images] if together else [[image] for image in images]
    expected = [encoded for prompt in prompts for encoded in reference.encode(prompt, wanted)]
    assert [one['path'] for one in found] == [str(path / f'{number}.png') for number in range(3)]
    for one, other, image in zip(found, expected, images, strict=True):
        columns, rows = one['grid']
        assert (columns, rows) == (image.width // 448, image.height // 448)
        assert [tile['tokens'] for tile in one['tiles']] == other.tile_tokens
        assert np.allclose([tile['score'] for tile in one['tiles']], other.scores, atol=1e-4)
        assert one['tokens'] == sum(other.tile_tokens) and one['tokens_full'] == 256 * len(other.scores)


def test_pictures_are_drawn(reader, folder, capsys, tmp_path):
    path, _ = folder
    assert main(['route', str(path / '0.png'), str(path), '--model', str(reader), '-o', str(tmp_path / 'new')]) == 0
    out = capsys.readouterr().out
    assert '4 pictures: ' in out and f'{tmp_path / "new" / "sheet.png"}' in out
    names = sorted(file.name for file in (tmp_path / 'new').iterdir())
    assert names == ['001-0.png', '002-0.png', '003-1.png', '004-2.png', 'sheet.png'], 'none overwrites another'


@pytest.mark.parametrize(
    'given, sentence',
    [
        (['missing.png'], 'missing.png: there is no such picture.'),
        (['empty'], 'empty is a folder without pictures'),
        (['text.png'], 'text.png: '),
        (['fine.png', '--compression', '2'], '--compression must be "auto", "none", "all", or a number from 0 to 1'),
        (['fine.png', '-o', 'fine.png'], 'fine.png: File exists'),
        (['fine.png', '--device', 'nowhere'], "--device must be cpu, cuda or cuda:1 (and so on), not 'nowhere'."),
        (['fine.png', '--device', 'cuda:99'], '--device cuda:99: torch sees '),
    ],
)
def test_refused(reader, tmp_path, capsys, monkeypatch, given, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.png').write_text('this is no picture')
    Image.new('RGB', (60, 40), 'green').save('fine.png')
    assert main(['route', *given, '--model', str(reader)]) == 1
    err = capsys.readouterr().err
    assert sentence in err and 'Traceback' not in err


def test_models_that_have_no_router(tmp_path, capsys):
    Image.new('RGB', (60, 40), 'green').save(tmp_path / 'fine.png')
    plain = make_tiny_checkpoint(tmp_path / 'plain', flash=False)
    for model, sentence in (
        (plain, 'flash_mode'),
        (tmp_path, 'is not a checkpoint directory: it holds no config.json'),
    ):
        assert main(['route', str(tmp_path / 'fine.png'), '--model', str(model)]) == 1
        assert sentence in capsys.readouterr().err


def test_folders_hold_pictures_among_other_files(folder):
    path, _ = folder
    assert [file.name for file in find([path, path / '1.png'])] == ['0.png', '1.png', '2.png', '1.png']


def test_folders_are_searched_to_their_depth(tmp_path):
    for name in ('b/c/2.JPG', 'a/1.png', 'a/notes.txt', '3.webp'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [file.relative_to(tmp_path).as_posix() for file in find([tmp_path])]
    assert found == ['3.webp', 'a/1.png', 'b/c/2.JPG']
