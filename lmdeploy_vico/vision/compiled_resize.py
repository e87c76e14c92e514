"""Bicubic resizing along rows and along columns, compiled by numba: Pillow's arithmetic in half its time.

Pillow resizes with 22-bit fixed-point weights and bytes in between. Done with the same integers in the same order the
result is the same; what is saved comes from the processor's vector instructions, for which a pass has to run over
consecutive bytes: the one along rows works on transposed strips, the one along columns writes straight into tiles. The
functions release the GIL.

They are compiled for one set of types, when they are first called. They are kept on disk only where NUMBA_CACHE_DIR
names a folder for it: numba's own choice of one ends the import where neither the installation nor the home directory
can be written to.
"""

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

Size = tuple[int, int]

WEIGHT_BITS = 22  # 32 less 8 for a pixel and 2 for sums that overshoot
HALF = 1 << (WEIGHT_BITS - 1)
KEPT = bool(os.environ.get('NUMBA_CACHE_DIR'))
STRIP = 64  # rows that are transposed at a time: with pictures of a few thousand columns they stay in the L2 cache


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function without the GIL; keep the result where a folder is named and can be written to."""

    def make(function: Callable[..., Any]) -> Any:
        if KEPT:
            with contextlib.suppress(RuntimeError):  # numba finds no place
                return njit(cache=True, nogil=True, **options)(function)
        return njit(nogil=True, **options)(function)

    return make


def read_only(pixels: np.ndarray) -> np.ndarray:
    """Mark an array read-only, as Pillow's are. To numba that is another type; each pass is compiled for it alone."""
    pixels.setflags(write=False)
    return pixels


def rows_first(pixels: np.ndarray, size: Size, out: np.ndarray, columns: int = 1) -> np.ndarray:
    """Resize along rows, then along columns.

    Args:
        pixels: read-only uint8 ``[height, width, 3]``.
        size: new width and height.
        out: uint8 ``[rows * side * columns, side * 3]``, written tile by tile.
        columns: of tiles, whose sides are ``size[0] / columns``.

    Returns:
        ``out``.
    """
    height, width, _ = pixels.shape
    narrow = np.empty((height, size[0], 3), np.uint8)
    _resize_rows(pixels, *weights(width, size[0]), narrow)
    _resize_columns(read_only(narrow.reshape(height, -1)), *weights(height, size[1]), out, columns)
    return out


def columns_first(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Resize read-only uint8 ``[height, width, 3]`` along columns, then along rows, to this (width, height)."""
    height, width, _ = pixels.shape
    low = np.empty((size[1], width * 3), np.uint8)
    _resize_columns(pixels.reshape(height, -1), *weights(height, size[1]), low, 1)
    out = np.empty((size[1], size[0], 3), np.uint8)
    _resize_rows(read_only(low.reshape(size[1], width, 3)), *weights(width, size[0]), out)
    return out


@compiled(error_model='numpy')
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


@compiled()
def _bicubic(x: float) -> float:
    a = -0.5
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


@compiled()
def _weigh(total, line, weight):  # type: ignore[no-untyped-def]
    for i in range(len(line)):
        total[i] += np.int32(line[i]) * weight


@compiled()
def _clip(total, line):  # type: ignore[no-untyped-def]
    for i in range(len(line)):
        line[i] = np.uint8(min(max(total[i] >> WEIGHT_BITS, 0), 255))


@compiled()
def _transpose(source, out):  # type: ignore[no-untyped-def]
    for left in range(0, source.shape[1], 32):
        for y in range(source.shape[0]):
            for x in range(left, min(left + 32, source.shape[1])):
                for channel in range(3):
                    out[x, y, channel] = source[y, x, channel]


@compiled()
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


@compiled()
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
