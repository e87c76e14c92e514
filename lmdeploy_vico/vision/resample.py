"""Bicubic resizing of RGB pictures into tiles: the pixels of Pillow's ``Image.resize``, in half its time.

Pillow resizes along rows and along columns, with 22-bit fixed-point weights and bytes in between. Done with the same
integers in the same order the result is the same; what is saved comes from the processor's vector instructions, for
which a pass has to run over consecutive bytes: the one along rows works on transposed strips, the one along columns
writes straight into tiles. The functions release the GIL.
"""

import logging
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numba import njit
from PIL import Image

logger = logging.getLogger(__name__)

Size = tuple[int, int]

WEIGHT_BITS = 22  # 32 less 8 for a pixel and 2 for sums that overshoot
HALF = 1 << (WEIGHT_BITS - 1)
STRIP = 64  # rows that are transposed at a time: with pictures of a few thousand columns they stay in the L2 cache


def resize_into_tiles(image: Image.Image, tiles: np.ndarray, columns: int) -> None:
    """Resize a picture to a grid of tiles.

    Args:
        image: in mode RGB.
        tiles: uint8 ``[rows * columns, side, side, 3]``, contiguous: where the grid's tiles go, row by row.
        columns: of the grid.
    """
    side = tiles.shape[1]
    size = columns * side, len(tiles) // columns * side
    order = pass_order()
    if order is None:
        cut(np.asarray(image.resize(size)), tiles, columns)
    elif order(*image.size, *size):
        cut(_columns_first(np.asarray(image), size), tiles, columns)
    else:
        _rows_first(np.asarray(image), size, tiles.reshape(-1, side * 3), columns)


def cut(pixels: np.ndarray, tiles: np.ndarray, columns: int) -> None:
    """Copy uint8 ``[rows * side, columns * side, 3]`` to tiles, row by row."""
    side = tiles.shape[1]
    grid = tiles.reshape(-1, columns, side, side, 3)
    grid[...] = pixels.reshape(-1, side, columns, side, 3).transpose(0, 2, 1, 3, 4)


def _rows_first(pixels: np.ndarray, size: Size, out: np.ndarray, columns: int = 1) -> np.ndarray:
    height, width, _ = pixels.shape
    narrow = np.empty((height, size[0], 3), np.uint8)
    _resize_rows(pixels, *weights(width, size[0]), narrow)
    _resize_columns(narrow.reshape(height, -1), *weights(height, size[1]), out, columns)
    return out


def _columns_first(pixels: np.ndarray, size: Size) -> np.ndarray:
    height, width, _ = pixels.shape
    low = np.empty((size[1], width * 3), np.uint8)
    _resize_columns(pixels.reshape(height, -1), *weights(height, size[1]), low, 1)
    out = np.empty((size[1], size[0], 3), np.uint8)
    _resize_rows(low.reshape(size[1], width, 3), *weights(width, size[0]), out)
    return out


def _never(width: int, height: int, new_width: int, new_height: int) -> bool:
    return False


def _if_it_shrinks_far_more(width: int, height: int, new_width: int, new_height: int) -> bool:
    return height > new_height and height - new_height > 2 * (width - new_width)


@lru_cache(maxsize=1)
def pass_order() -> Callable[[int, int, int, int], bool] | None:
    """When the Pillow that is installed resizes along columns first, by width, height, new width and new height.

    The order matters for the last bit, and is not the same in all versions: whichever rule agrees with Pillow on
    small pictures is taken. None means that neither does, and that Pillow itself has to be used.
    """
    rng = np.random.default_rng(0)
    sizes = [((20, 60), (10, height)) for height in (20, 39, 40, 41, 59, 60, 70)]
    sizes += [((10, 60), (20, height)) for height in (20, 59, 70)]
    sizes += [((60, 20), (30, 10)), ((20, 20), (10, 10)), ((20, 20), (40, 40))]
    rules = [_never, _if_it_shrinks_far_more]
    for (width, height), size in sizes:
        pixels = rng.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)
        expected = np.asarray(Image.fromarray(pixels).resize(size))
        rows_first = _rows_first(pixels, size, np.empty((size[1], size[0] * 3), np.uint8)).reshape(expected.shape)
        results = {False: rows_first, True: _columns_first(pixels, size)}
        rules = [rule for rule in rules if np.array_equal(results[rule(width, height, *size)], expected)]
    if not rules:
        logger.warning('This Pillow resizes in a way of its own: pictures are left to it, which takes twice as long.')
        return None
    return rules[0]


@lru_cache(maxsize=256)
def weights(size: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Fixed-point weights of Pillow's bicubic filter.

    Args:
        size: pixels along one side.
        target: to become this many.

    Returns:
        int64 ``[target, 2]``: the first pixel that each target pixel is made of, and how many. int32 ``[target, n]``:
        their weights.
    """
    scale = size / target
    stretch = max(scale, 1.0)
    support, step = 2.0 * stretch, 1.0 / stretch
    spans = np.zeros((target, 2), np.int64)
    fixed = np.zeros((target, math.ceil(support) * 2 + 1), np.int32)
    for index in range(target):
        center = (index + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), size)
        raw = [_bicubic((pixel - center + 0.5) * step) for pixel in range(first, last)]
        total = 0.0
        for weight in raw:  # not sum(), which is more exact than Pillow in newer Pythons
            total += weight
        spans[index] = first, last - first
        for place, weight in enumerate(raw):
            fixed[index, place] = int(math.copysign(0.5, weight) + weight / total * (1 << WEIGHT_BITS))
    return spans, fixed


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


@njit(nogil=True)
def _weigh(total, line, weight):  # type: ignore[no-untyped-def]
    for i in range(len(line)):
        total[i] += np.int32(line[i]) * weight


@njit(nogil=True)
def _clip(total, line):  # type: ignore[no-untyped-def]
    for i in range(len(line)):
        line[i] = np.uint8(min(max(total[i] >> WEIGHT_BITS, 0), 255))


@njit(nogil=True)
def _transpose(source, out):  # type: ignore[no-untyped-def]
    for left in range(0, source.shape[1], 32):
        for y in range(source.shape[0]):
            for x in range(left, min(left + 32, source.shape[1])):
                for channel in range(3):
                    out[x, y, channel] = source[y, x, channel]


@njit(nogil=True)
def _resize_rows(source, spans, fixed, out):  # type: ignore[no-untyped-def]
    """Every row of pixels ``[height, width, 3]`` to ``[height, target, 3]``."""
    height, width, _ = source.shape
    wide = np.empty((width, STRIP, 3), np.uint8)
    narrow = np.empty((len(spans), STRIP, 3), np.uint8)
    total = np.empty(STRIP * 3, np.int32)
    for top in range(0, height, STRIP):
        rows = min(STRIP, height - top)
        _transpose(source[top : top + rows], wide)
        for x in range(len(spans)):
            total[:] = HALF
            for k in range(spans[x, 1]):
                _weigh(total, wide[spans[x, 0] + k].reshape(-1), fixed[x, k])
            _clip(total, narrow[x].reshape(-1))
        _transpose(narrow[:, :rows], out[top : top + rows])


@njit(nogil=True)
def _resize_columns(source, spans, fixed, out, columns):  # type: ignore[no-untyped-def]
    """All columns of ``[height, columns * line]`` to tiles of ``line`` bytes a row, ``[tiles * side, line]``."""
    line = out.shape[1]
    side = line // 3
    total = np.empty(line, np.int32)
    for y in range(len(spans)):
        for column in range(columns):
            total[:] = HALF
            for k in range(spans[y, 1]):
                _weigh(total, source[spans[y, 0] + k, column * line : (column + 1) * line], fixed[y, k])
            _clip(total, out[(y // side * columns + column) * side + y % side])
