"""Dynamic high resolution: an image becomes a grid of 448x448 tiles, plus a thumbnail when there are several."""

import hashlib
import hmac
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from lmdeploy_vico.config import IMAGE_SIZE, VicoConfig
from lmdeploy_vico.vision.resample import cut, resize_into_tiles

TILE_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
DIGEST_SIZE = 16


@lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns * rows <= max_tiles, by area.

    Grids of the same area stand in the iteration order of a set filled this way, as in LMDeploy: where two of them are
    equally close to an image's aspect ratio, that order decides which one is taken.
    """
    grids = {
        (columns, rows)
        for side in range(min_tiles, max_tiles + 1)
        for columns in range(1, side + 1)
        for rows in range(1, side + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """The (columns, rows) whose aspect ratio is closest to the image's.

    Of equally close grids a larger one is taken when the image has more than half of its pixels.
    """
    aspect_ratio = width / height
    best, best_distance = (1, 1), float('inf')
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        distance = abs(aspect_ratio - columns / rows)
        closer = distance < best_distance
        as_close = distance == best_distance
        if closer or (as_close and width * height > 0.5 * IMAGE_SIZE * IMAGE_SIZE * columns * rows):
            best, best_distance = (columns, rows), distance
    return best


@dataclass(frozen=True)
class Grid:
    """Into how many tiles an image is cut.

    Attributes:
        columns, rows: of tiles.
        thumbnail: whether a tile that shows the whole image follows them.
    """

    columns: int
    rows: int
    thumbnail: bool

    @property
    def tiles(self) -> int:
        """All tiles, the thumbnail included."""
        return self.columns * self.rows + self.thumbnail


@dataclass(frozen=True)
class Tiling:
    """How a server or a checkpoint cuts images; needs no model.

    Attributes:
        min_tiles, max_tiles: bounds of a grid, without the thumbnail.
        use_thumbnail: whether an image of several tiles gets one.
    """

    min_tiles: int
    max_tiles: int
    use_thumbnail: bool = True

    @classmethod
    def of(cls, config: VicoConfig) -> 'Tiling':
        """The tiling that a checkpoint's config asks for."""
        return cls(config.min_tiles, config.max_tiles, config.use_thumbnail)

    @property
    def most(self) -> int:
        """The most tiles of an image, the thumbnail included."""
        return self.max_tiles + self.use_thumbnail

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid of an image of this (width, height)."""
        columns, rows = choose_grid(*size, self.min_tiles, self.max_tiles)
        return Grid(columns, rows, self.use_thumbnail and columns * rows > 1)


def cut_grid(image: Image.Image, grid: Grid) -> np.ndarray:
    """Resize the whole image to its grid and cut it.

    The image is resized in its own mode and converted to RGB afterwards, in LMDeploy's order: for palette, alpha and
    bilevel images the two orders give different pixels.

    Returns:
        uint8 RGB ``[tiles, 448, 448, 3]``: the grid's tiles row by row, then the thumbnail.
    """
    blocks = grid.columns * grid.rows
    tiles = np.empty((grid.tiles, *TILE_SHAPE), dtype=np.uint8)
    grids = [(tiles[:blocks], grid.columns), (tiles[blocks:], 1)][: 1 + grid.thumbnail]
    if image.mode == 'RGB':
        resize_into_tiles(image, *grids)
        return tiles
    for part, across in grids:
        size = across * IMAGE_SIZE, len(part) // across * IMAGE_SIZE
        cut(np.asarray(image.resize(size).convert('RGB')), part, across)
    return tiles


def preparation_memory(size: tuple[int, int], grid: Grid) -> int:
    """Bytes that cutting an image of this (width, height) takes at most, besides its own pixels.

    Resizing keeps what one pass makes of all rows, or all columns, and for each new row and column the weights of all
    the old ones that it is made of: of a picture with very long sides that is far more than its pixels.
    """
    width, height = size
    columns, rows = grid.columns * IMAGE_SIZE, grid.rows * IMAGE_SIZE
    one_pass = 4 * max(columns * height, width * rows)
    weights = 8 * 5 * (width + height + columns + rows)
    return one_pass + weights + grid.tiles * math.prod(TILE_SHAPE)


def cut_tiles(image: Image.Image, min_tiles: int, max_tiles: int, use_thumbnail: bool = True) -> np.ndarray:
    """Tiles ``[n, 448, 448, 3]`` of an image, on the grid that fits it best; see :func:`cut_grid`."""
    return cut_grid(image, Tiling(min_tiles, max_tiles, use_thumbnail).grid(image.size))


def tile_digests(tiles: np.ndarray, salt: str = '') -> list[bytes]:
    """A 16-byte digest of each tile in ``[n, 448, 448, 3]``, of its content and a salt.

    Nobody who does not know the salt can tell from digests with it which tiles they are of.
    """
    # Of the collision-resistant hashes, the one for which processors have instructions.
    digests = [hashlib.sha256(tile).digest() for tile in tiles]
    if salt:
        digests = [hmac.digest(salt.encode(), digest, 'sha256') for digest in digests]
    return [digest[:DIGEST_SIZE] for digest in digests]
