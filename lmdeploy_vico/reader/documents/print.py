"""Tiles with printed entries: a key letter, and its code beside it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lmdeploy_vico.reader.documents.codes import CHARACTERS, KEYS, Split, draw_code
from lmdeploy_vico.reader.documents.tile import PATCH, PATCHES, SIZE, Entry, Question, Tile, blank

FONTS = (
    'DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSans-Oblique', 'DejaVuSansMono', 'DejaVuSansMono-Bold', 'DejaVuSerif',
    'DejaVuSerif-Bold',
)  # fmt: skip
SIZES = (16, 17, 18)  # pixels of a font at a pitch of 14, whose capitals then have about 12
CODE_QUESTION = 'Code of {}?'
TRIES = 30  # to find room for an entry
LEAD = 2  # characters of an entry before its code: the key and a blank


@dataclass(frozen=True)
class Print:
    """A size of print.

    Attributes:
        kind: its name.
        pitch: pixels from one character to the next, a multiple of a patch.
        jitter: an entry stands at most so many pixels beside the grid of patches.
        margin: blank patches between one entry and the next.
        listed: entries stand one below the other, ``margin`` patches apart; otherwise anywhere.
        digits: of a code.
    """

    kind: str
    pitch: int
    jitter: int
    margin: int = 1
    listed: bool = False
    digits: int = 4

    @property
    def cell(self) -> int:
        """Patches of a character's side."""
        return self.pitch // PATCH

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of patches that an entry covers."""
        return self.cell, self.cell * (LEAD + self.digits)


# One of 256 visual tokens stands for 2 x 2 patches, one of 64 for 4 x 4. In a list of fine print an entry stands on
# every other row of patches, so one of 64 tokens has characters of two entries, one of 256 only of one. Entries of
# medium print are so far apart that no token ever has two.
FINE = Print('fine', 14, jitter=2, listed=True)
MEDIUM = Print('medium', 28, jitter=4, margin=3)


@cache
def _sprite(font: str, size: int, pitch: int, character: str) -> NDArray[np.float32]:
    """A character in the middle of a square 1.5 times as large as its pitch: float32, 1 where there is ink."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), 'fonts', 'ttf', f'{font}.ttf')
    drawn = ImageFont.truetype(str(path), size * pitch // PATCH)
    side = pitch + pitch // 2
    image = Image.new('L', (side, side))
    left, top, right, bottom = drawn.getbbox(character)
    place = ((side - (right - left)) // 2 - left, (side - (bottom - top)) // 2 - top)
    ImageDraw.Draw(image).text(place, character, font=drawn, fill=255)
    return np.asarray(image, np.float32) / np.float32(255)


def printed_tile(rng: np.random.Generator, size: Print, keys: Sequence[str], split: Split) -> Tile:
    """Print an entry for each key; those that find no room are left out.

    Args:
        rng: draws everything.
        size: of the print.
        keys: letters; one that stands here twice is not asked for.
        split: which codes.
    """
    tile, light = blank(rng)
    ink = (rng.uniform(0, 70, 3) if light else rng.uniform(190, 255, 3)).astype(np.float32)
    taken = np.zeros((PATCHES, PATCHES), bool)
    listed = _list(rng, len(keys), size) if size.listed else iter(())
    for key in keys:
        place = next(listed, None) if size.listed else _room(rng, taken, size)
        if place is not None:
            code = draw_code(rng, size.digits, split)
            _print_entry(rng, tile, size, place, key + ' ' + code, ink)
            rows, columns = (slice(start, start + extent) for start, extent in zip(place, size.extent, strict=True))
            tile.entries.append(Entry(CODE_QUESTION.format(key), code, rows, columns))
    often = Counter(entry.question for entry in tile.entries)
    tile.questions = [
        Question(entry.question, entry.code, size.kind) for entry in tile.entries if often[entry.question] == 1
    ]
    return tile


def _list(rng: np.random.Generator, entries: int, size: Print) -> Iterator[tuple[int, int]]:
    """Row and column of patches of each entry of a list that stands anywhere; it ends at the bottom of the tile."""
    line = size.cell + size.margin
    lines = min(entries, (PATCHES + size.margin) // line)
    top = int(rng.integers(0, PATCHES + size.margin - lines * line + 1))
    left = int(rng.integers(0, PATCHES - size.extent[1] + 1))
    return iter([(top + number * line, left) for number in range(lines)])


def _room(rng: np.random.Generator, taken: NDArray[np.bool_], size: Print) -> tuple[int, int] | None:
    """Find row and column of patches where an entry fits with its margin, and take them."""
    (height, width), margin = size.extent, size.margin
    for _ in range(TRIES):
        row, column = rng.integers(0, PATCHES - height + 1), rng.integers(0, PATCHES - width + 1)
        around = taken[max(row - margin, 0) : row + height + margin, max(column - margin, 0) : column + width + margin]
        if not around.any():
            taken[row : row + height, column : column + width] = True
            return int(row), int(column)
    return None


def _print_entry(
    rng: np.random.Generator, tile: Tile, size: Print, place: tuple[int, int], text: str, ink: NDArray[np.float32]
) -> None:
    row, column = place
    font, points = FONTS[rng.integers(len(FONTS))], SIZES[rng.integers(len(SIZES))]
    right, down = (int(shift) for shift in rng.integers(-size.jitter, size.jitter + 1, 2))
    for number, character in enumerate(text):
        if character == ' ':
            continue
        start = column + number * size.cell
        sprite = _sprite(font, points, size.pitch, character)
        _ink(tile, sprite, start * PATCH + right - size.pitch // 4, row * PATCH + down - size.pitch // 4, ink)
        seen = {
            'glyph': 1 + CHARACTERS.index(character),
            'key': 1 + KEYS.index(text[0]),
            'place': max(number, 1),  # the key's is 1, that of the first digit 2
        }
        tile.mark(slice(row, row + size.cell), slice(start, start + size.cell), seen)


def _ink(tile: Tile, sprite: NDArray[np.float32], left: int, top: int, ink: NDArray[np.float32]) -> None:
    side = len(sprite)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, SIZE), min(top + side, SIZE)
    covered = sprite[y0 - top : y1 - top, x0 - left : x1 - left, None]
    tile.pixels[y0:y1, x0:x1] += (ink - tile.pixels[y0:y1, x0:x1]) * covered
