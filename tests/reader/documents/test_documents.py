"""Documents: what is printed is what is asked, nothing is known by heart, and the labels are where the ink is."""

import numpy as np
import pytest

from lmdeploy_vico.reader.documents.codes import CHARACTERS, KEYS, Split, draw_code, is_withheld
from lmdeploy_vico.reader.documents.page import GRIDS, KINDS, PRINTS, make_page, make_tile
from lmdeploy_vico.reader.documents.pictures import COLOURS, PHOTOGRAPHS, SHAPES
from lmdeploy_vico.reader.documents.tile import PATCH, SIZE
from lmdeploy_vico.vision.tiling import cut_tiles

PLAIN = 12  # a value that differs by less from the page's is paper


def rng(seed=5):
    return np.random.default_rng(seed)


def test_one_code_in_ten_is_withheld():
    withheld = [is_withheld(f'{number:04}') for number in range(10_000)]
    assert 900 < sum(withheld) < 1100
    drawn = {split: {draw_code(rng(seed), 4, split) for seed in range(300)} for split in Split}
    assert not drawn[Split.TRAIN] & drawn[Split.TEST]
    assert all(map(is_withheld, drawn[Split.TEST])) and not any(map(is_withheld, drawn[Split.TRAIN]))


@pytest.mark.parametrize('kind', list(PRINTS))
def test_the_labels_of_a_print_spell_its_entries(kind):
    """An entry is read from the labels alone, as the ViT's heads would be."""
    size = PRINTS[kind]
    tile = make_tile(rng(), kind, KEYS, Split.TRAIN)
    glyphs, keys, places = (tile.labels[name] for name in ('glyph', 'key', 'place'))
    assert 1 <= len(tile.questions) <= len(KEYS)
    for question in tile.questions:
        key = question.text.removeprefix('Code of ').removesuffix('?')
        spelled = ''
        for place in range(1, 6):
            cells = (keys == 1 + KEYS.index(key)) & (
                (places == place) if place > 1 else glyphs == 1 + CHARACTERS.index(key)
            )
            assert cells.sum() == size.cell**2
            [glyph] = set(glyphs[cells])
            spelled += CHARACTERS[glyph - 1]
        assert spelled == key + question.answer and question.kind == kind


@pytest.mark.parametrize('kind', list(PRINTS))
def test_ink_is_where_the_labels_are(kind):
    """The middle of a labelled cell has ink; paper that is two patches away from all labels has none."""
    size = PRINTS[kind]
    tile = make_tile(rng(2), kind, KEYS[:2], Split.TRAIN)
    page = np.median(tile.pixels, axis=(0, 1))
    ink = np.abs(tile.pixels - page).max(2) > 60
    labelled = np.kron(tile.labels['glyph'] > 0, np.ones((PATCH, PATCH), bool))
    assert ink[labelled].mean() > 0.1
    margin = 2 * size.pitch
    rows, columns = np.where(labelled)
    far = np.ones_like(labelled)
    far[max(rows.min() - margin, 0) : rows.max() + margin, max(columns.min() - margin, 0) : columns.max() + margin] = (
        False
    )
    assert not ink[far].any()


def test_a_key_that_stands_twice_is_not_asked_for():
    tile = make_tile(rng(), 'fine', 'AAB', Split.TRAIN)
    assert [question.text for question in tile.questions] == ['Code of B?']


def test_shapes_and_photographs_say_what_they_are():
    for seed in range(20):
        shape = make_tile(rng(seed), 'shape', '', Split.TRAIN)
        answers = {question.text: question.answer for question in shape.questions}
        seen = shape.labels['shape'] > 0
        assert set(shape.labels['shape'][seen]) == {1 + SHAPES.index(answers['Which shape?'])}
        middle = np.argwhere(seen).mean(0).astype(int) * PATCH + PATCH // 2
        colour = np.array(COLOURS[answers['Which colour?']])
        assert np.abs(shape.pixels[middle[0], middle[1]] - colour).max() <= 21
    photo = make_tile(rng(), 'photo', '', Split.TRAIN)
    [question] = photo.questions
    assert set(photo.labels['photo'].flat) == {1 + list(PHOTOGRAPHS).index(question.answer)}


@pytest.mark.parametrize('count', list(GRIDS))
def test_a_picture_is_cut_into_its_tiles(count):
    """As it is served: the tiles, in their order, and a thumbnail if there is more than one."""
    from PIL import Image

    page = make_page(rng(count), ['fine', 'photo', 'shape', 'medium', 'fine', 'fine'][:count], Split.TEST)
    cut = np.asarray(cut_tiles(Image.fromarray(page.pixels), 1, 12, True))
    assert len(cut) == count + (count > 1)
    columns, _ = GRIDS[count]
    for number in range(count):
        row, column = divmod(number, columns)
        expected = page.pixels[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
        assert np.array_equal(cut[number], expected)


def test_the_questions_of_a_picture_have_one_answer():
    for seed in range(10):
        page = make_page(rng(seed), ['shape', 'fine', 'shape', 'medium', 'photo'], Split.TEST)
        texts = [question.text for question in page.questions]
        assert len(set(texts)) == len(texts) and 'Which shape?' not in texts
        assert all(is_withheld(one.answer) for one in page.questions if one.text.startswith('Code'))


def test_a_grid_that_there_is_not():
    with pytest.raises(ValueError, match='7 tiles: there are grids of 1, 2'):
        make_page(rng(), ['fine'] * 7, Split.TEST)


def test_the_same_seed_gives_the_same_picture():
    first, again, other = (make_page(rng(seed), list(KINDS), Split.TEST) for seed in (1, 1, 2))
    assert np.array_equal(first.pixels, again.pixels) and first.questions == again.questions
    assert not np.array_equal(first.pixels, other.pixels)
