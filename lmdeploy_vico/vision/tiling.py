"""Dynamic high resolution: an image becomes a grid of 448x448 tiles, plus a thumbnail when there are several."""

import hashlib
from functools import lru_cache

import numpy as np
from PIL import Image

from lmdeploy_vico.config import IMAGE_SIZE
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


def tile_count(width: int, height: int, min_tiles: int, max_tiles: int, use_thumbnail: bool = True) -> int:
    """How many tiles :func:`cut_tiles` makes of an image of this size, the thumbnail included."""
    columns, rows = choose_grid(width, height, min_tiles, max_tiles)
    blocks = columns * rows
    return blocks + 1 if use_thumbnail and blocks > 1 else blocks


def cut_tiles(image: Image.Image, min_tiles: int, max_tiles: int, use_thumbnail: bool = True) -> np.ndarray:
    """Resize the whole image to its grid and cut it.

    The image is resized in its own mode and converted to RGB afterwards, in LMDeploy's order: for palette, alpha and
    bilevel images the two orders give different pixels.

    Returns:
        uint8 RGB ``[tiles, 448, 448, 3]``: the grid's tiles row by row, then the thumbnail.
    """
    columns, rows = choose_grid(*image.size, min_tiles, max_tiles)
    blocks = columns * rows
    thumbnail = use_thumbnail and blocks > 1
    tiles = np.empty((blocks + thumbnail, *TILE_SHAPE), dtype=np.uint8)
    grids = [(tiles[:blocks], columns), (tiles[blocks:], 1)][: 1 + thumbnail]
    if image.mode == 'RGB':
        resize_into_tiles(image, *grids)
        return tiles
    for part, across in grids:
        size = across * IMAGE_SIZE, len(part) // across * IMAGE_SIZE
        cut(np.asarray(image.resize(size).convert('RGB')), part, across)
    return tiles


def tile_digests(tiles: np.ndarray) -> list[bytes]:
    """A 16-byte content digest of each tile in ``[n, 448, 448, 3]``."""
    # Of the collision-resistant hashes, the one for which processors have instructions.
    return [hashlib.sha256(tile).digest()[:DIGEST_SIZE] for tile in tiles]
