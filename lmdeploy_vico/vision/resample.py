"""Bicubic resizing of RGB pictures into tiles: the pixels of Pillow's ``Image.resize``, in half its time.

Pillow resizes along rows and along columns, with 22-bit fixed-point weights and bytes in between. Done with the same
integers in the same order the result is the same; what is saved comes from the processor's vector instructions, for
which a pass has to run over consecutive bytes: the one along rows works on transposed strips, the one along columns
writes straight into tiles. The functions release the GIL.

They are compiled for one set of types, by :func:`pass_order`, and not kept on disk: numba's cache ends the import where
neither the installation nor the home directory can be written to.
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
# Beyond these Pillow does it: few target pixels are made of a great many, and its memory is the smaller.
LONGEST_SIDE = 0xFFFF
MOST_PIXELS = 1 << 26
SHRINK = 32


def resize_into_tiles(image: Image.Image, *grids: tuple[np.ndarray, int]) -> None:
    """Resize a picture to grids of tiles.

    Args:
        image: in mode RGB.
        grids: of each, where its tiles go, row by row, as contiguous uint8 ``[rows * columns, side, side, 3]``; and
            its columns.
    """
    order = pass_order()
    pixels = None
    for tiles, columns in grids:
        side = tiles.shape[1]
        size = columns * side, len(tiles) // columns * side
        if order is None or _extreme(image.size, size):
            cut(np.asarray(image.resize(size)), tiles, columns)
            continue
        if pixels is None:  # once for all grids: Pillow hands its pixels out with the GIL held
            pixels = _read_only(np.asarray(image))
        if order(*image.size, *size):
            cut(_columns_first(pixels, size), tiles, columns)
        else:
            _rows_first(pixels, size, tiles.reshape(-1, side * 3), columns)


def _extreme(size: Size, target: Size) -> bool:
    shrinks = any(side > SHRINK * new_side for side, new_side in zip(size, target, strict=True))
    return shrinks or max(size) > LONGEST_SIDE or size[0] * size[1] > MOST_PIXELS


def _read_only(pixels: np.ndarray) -> np.ndarray:
    # To numba that is another type. Pillow's arrays have it; with all sources so, each pass is compiled once.
    pixels.setflags(write=False)
    return pixels


def cut(pixels: np.ndarray, tiles: np.ndarray, columns: int) -> None:
    """Copy uint8 ``[rows * side, columns * side, 3]`` to tiles, row by row."""
    side = tiles.shape[1]
    grid = tiles.reshape(-1, columns, side, side, 3)
    grid[...] = pixels.reshape(-1, side, columns, side, 3).transpose(0, 2, 1, 3, 4)


def _rows_first(pixels: np.ndarray, size: Size, out: np.ndarray, columns: int = 1) -> np.ndarray:
    height, width, _ = pixels.shape
    narrow = np.empty((height, size[0], 3), np.uint8)
    _resize_rows(pixels, *weights(width, size[0]), narrow)
    _resize_columns(_read_only(narrow.reshape(height, -1)), *weights(height, size[1]), out, columns)
    return out


def _columns_first(pixels: np.ndarray, size: Size) -> np.ndarray:
    height, width, _ = pixels.shape
    low = np.empty((size[1], width * 3), np.uint8)
    _resize_columns(pixels.reshape(height, -1), *weights(height, size[1]), low, 1)
    out = np.empty((size[1], size[0], 3), np.uint8)
    _resize_rows(_read_only(low.reshape(size[1], width, 3)), *weights(width, size[0]), out)
    return out


def _never(width: int, height: int, new_width: int, new_height: int) -> bool:
    return False


def _if_it_shrinks_far_more(width: int, height: int, new_width: int, new_height: int) -> bool:
    return height > new_height and height - new_height > 2 * (width - new_width)


@lru_cache(maxsize=1)
def pass_order() -> Callable[[int, int, int, int], bool] | None:
    """When the Pillow that is installed resizes along columns first, by width, height, new width and new height.

    The order matters for the last bit, and is not the same in all versions: whichever rule agrees with Pillow on
    small pictures is taken. None means that neither does, and that Pillow itself has to be used. Trying compiles all
    that pictures need.
    """
    rng = np.random.default_rng(0)
    sizes = [((20, 60), (10, height)) for height in (20, 39, 40, 41, 59, 60, 70)]
    sizes += [((10, 60), (20, height)) for height in (20, 59, 70)]
    sizes += [((60, 20), (30, 10)), ((20, 20), (10, 10)), ((20, 20), (40, 40))]
    rules = [_never, _if_it_shrinks_far_more]
    for (width, height), size in sizes:
        pixels = rng.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)
        image = Image.fromarray(pixels)
        expected, pixels = np.asarray(image.resize(size)), _read_only(np.asarray(image))
        rows_first = _rows_first(pixels, size, np.empty((size[1], size[0] * 3), np.uint8)).reshape(expected.shape)
        results = {False: rows_first, True: _columns_first(pixels, size)}
        rules = [rule for rule in rules if np.array_equal(results[rule(width, height, *size)], expected)]
    if not rules:
        logger.warning('This Pillow resizes in a way of its own: pictures are left to it, which takes twice as long.')
        return None
    return rules[0]


@njit(nogil=True, error_model='numpy')
def weights(size: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Fixed-point weights of Pillow's bicubic filter: its operations in its order, for they are rounded to integers.

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
    spans = np.empty((target, 2), np.int64)
    fixed = np.zeros((target, math.ceil(support) * 2 + 1), np.int32)
    raw = np.empty(fixed.shape[1])
    for index in range(target):
        center = (index + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), size) - first
        spans[index, 0], spans[index, 1] = first, count
        total = 0.0
        for k in range(count):
            raw[k] = _bicubic((k + first - center + 0.5) * step)
            total += raw[k]
        for k in range(count):
            weight = raw[k] / total
            fixed[index, k] = int((-0.5 if weight < 0 else 0.5) + weight * (1 << WEIGHT_BITS))
    return spans, fixed


@njit(nogil=True)
def _bicubic(x: float) -> float:
    a = -0.5
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
    strip = min(STRIP, height)
    wide = np.empty((width, strip, 3), np.uint8)
    narrow = np.empty((len(spans), strip, 3), np.uint8)
    total = np.empty(strip * 3, np.int32)
    for top in range(0, height, strip):
        rows = min(strip, height - top)
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
