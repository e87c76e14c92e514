"""Drawn pictures: tiles where they belong, shade over what is compressed, counts below."""

import numpy as np
from PIL import Image

from lmdeploy_vico.inspection.drawing import CAPTION, GAP, SHEET_WIDTH, SIDE, VEIL, draw, sheet
from lmdeploy_vico.inspection.report import as_table, summary
from lmdeploy_vico.inspection.routed import Routed
from lmdeploy_vico.vision.tiling import Grid

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (120, 120, 0), (0, 120, 120), (120, 0, 120)]
CENTRE = SIDE // 2, SIDE // 2 + 20  # of a tile, below the plate with the score


def patchwork(columns, rows, tokens):
    """A picture with a colour a tile."""
    pixels = np.zeros((rows * 100, columns * 100, 3), np.uint8)
    for number in range(columns * rows):
        row, column = divmod(number, columns)
        pixels[100 * row : 100 * (row + 1), 100 * column : 100 * (column + 1)] = COLOURS[number]
    grid = Grid(columns, rows, columns * rows > 1)
    return Routed('a/patchwork.png', Image.fromarray(pixels), grid, [0.5] * grid.tiles, tokens)


def at(picture, left, top):
    return np.array(picture.getpixel((left + CENTRE[0], top + CENTRE[1])), float)


def test_compressed_tiles_are_shaded_and_no_others():
    tokens = [64, 256, 256, 64, 64, 256, 64]
    picture = draw(patchwork(3, 2, tokens))
    for number, count in enumerate(tokens[:-1]):
        row, column = divmod(number, 3)
        seen, colour = at(picture, column * SIDE, row * SIDE), np.array(COLOURS[number], float)
        if count == 256:
            assert np.abs(seen - colour).max() <= 1
        else:
            assert np.abs(seen - VEIL).sum() < np.abs(colour - VEIL).sum() / 2
    # The thumbnail stands beside the grid: the middle of its lower half is the middle tile of the lower row.
    thumbnail = at(picture, 3 * SIDE + GAP, 0)
    assert np.abs(thumbnail - VEIL).sum() < np.abs(np.array(COLOURS[4]) - VEIL).sum() / 2


def test_sizes():
    one = draw(patchwork(1, 1, [256]))
    assert one.height == SIDE + CAPTION and one.width >= SIDE
    assert draw(patchwork(3, 2, [64] * 7)).size == (4 * SIDE + GAP, 2 * SIDE + CAPTION)


def test_scores_are_written():
    """Another score, other pixels: on its tile, and nowhere else."""
    routed = patchwork(2, 1, [256, 256, 256])
    before = np.asarray(draw(routed), int)
    after = np.asarray(draw(Routed(routed.name, routed.image, routed.grid, [0.5, 0.83, 0.5], routed.tokens)), int)
    rows, columns = np.nonzero(np.abs(before - after).sum(2))
    assert len(rows) and columns.min() >= SIDE and columns.max() < 2 * SIDE and rows.max() < SIDE


def test_a_sheet_has_room_for_all():
    pictures = [Image.new('RGB', (width, 100 + width % 7), 'red') for width in (900, 700, 300, 300, 300, 2000)]
    page = np.asarray(sheet(pictures), int)
    red = (page == (255, 0, 0)).all(2).sum()
    assert red == sum(picture.width * picture.height for picture in pictures), 'none hides another'
    assert page.shape[1] >= 2000 > SHEET_WIDTH


def test_what_is_printed(capsys):
    from rich.console import Console

    routed = [patchwork(3, 2, [64] * 6 + [256]), patchwork(1, 1, [256])]
    Console(width=120).print(as_table(routed))
    out = capsys.readouterr().out
    assert 'a/patchwork.png' in out and '300x200' in out and '640' in out and '1792' in out and '64%' in out
    assert summary(routed) == '2 pictures: 6 of 8 tiles get 64 tokens, 56% of all visual tokens saved.'
