"""Pictures of several tiles, and what is asked about them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmdeploy_vico.reader.documents.codes import KEYS, Split
from lmdeploy_vico.reader.documents.pictures import photo_tile, shape_tile
from lmdeploy_vico.reader.documents.print import FINE, MEDIUM, printed_tile
from lmdeploy_vico.reader.documents.tile import SIZE, Question, Tile, with_noise

PRINTS = {size.kind: size for size in (FINE, MEDIUM)}
KINDS = (*PRINTS, 'shape', 'photo')
# Columns and rows by the number of tiles: InternVL's tiling cuts a picture of this shape into just these tiles.
GRIDS = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 5: (5, 1), 6: (3, 2)}


@dataclass(frozen=True)
class Page:
    """A picture.

    Attributes:
        pixels: uint8 ``[448 * rows, 448 * columns, 3]``.
        tiles: with their labels, row by row.
        kinds: of the tiles.
        questions: those that have one answer in the whole picture.
    """

    pixels: NDArray[np.uint8]
    tiles: Sequence[Tile]
    kinds: Sequence[str]
    questions: Sequence[Question]

    def part(self, number: int) -> NDArray[np.uint8]:
        """The pixels of a tile."""
        return self.pixels[part_of(number, len(self.tiles))]


def part_of(number: int, tiles: int) -> tuple[slice, slice]:
    """Where a tile of a picture stands."""
    row, column = divmod(number, GRIDS[tiles][0])
    return slice(row * SIZE, (row + 1) * SIZE), slice(column * SIZE, (column + 1) * SIZE)


def make_tile(rng: np.random.Generator, kind: str, keys: Sequence[str], split: Split) -> Tile:
    """Make one tile.

    Args:
        rng: draws everything.
        kind: one of :data:`KINDS`.
        keys: of its entries, if it is printed.
        split: which codes are printed.
    """
    if kind in PRINTS:
        return printed_tile(rng, PRINTS[kind], keys, split)
    return shape_tile(rng) if kind == 'shape' else photo_tile(rng)


def make_page(rng: np.random.Generator, kinds: Sequence[str], split: Split) -> Page:
    """Make a picture with a tile of each of ``kinds``; the keys are shared out among the printed ones.

    Raises:
        ValueError: there is no grid of so many tiles.
    """
    if len(kinds) not in GRIDS:
        raise ValueError(f'{len(kinds)} tiles: there are grids of {", ".join(map(str, GRIDS))}.')
    columns, rows = GRIDS[len(kinds)]
    printed = sum(kind in PRINTS for kind in kinds)
    keys = [str(key) for key in rng.permutation(list(KEYS))]
    share = len(keys) // max(printed, 1)
    tiles = []
    for kind in kinds:
        mine = keys[:share] if kind in PRINTS else []
        keys = keys[len(mine) :]
        tiles.append(make_tile(rng, kind, mine, split))
    pixels = np.empty((rows * SIZE, columns * SIZE, 3), np.uint8)
    for number, tile in enumerate(tiles):
        pixels[part_of(number, len(tiles))] = with_noise(rng, tile.pixels)
    asked = [question for tile in tiles for question in tile.questions]
    often = Counter(question.text for question in asked)
    return Page(pixels, tiles, kinds, [question for question in asked if often[question.text] == 1])
