"""Bicubic resizing of RGB pictures into tiles: the pixels of Pillow's ``Image.resize``, in half its time.

Compiled passes (:mod:`~lmdeploy_vico.vision.compiled_resize`) do what Pillow does; where they cannot, Pillow does it,
and the pixels are the same. numba, which compiles them, is a dependency all the same. Preparing images is what bounds a
server with few cores, and on one core ten tiles of a 1500 x 1500 picture took 34 ms with it and 67 ms without, thirteen
of a 640 x 480 one 12 and 44 ms. It costs 207 MB of an installation of 8 GB, 3 s of one core while a server starts and
150 MB of memory. But it follows new versions of numpy and Python months later: where it cannot be imported, the server
starts without it.
"""

import logging
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import PIL
from PIL import Image

logger = logging.getLogger(__name__)

try:
    from lmdeploy_vico.vision import compiled_resize
except (ImportError, OSError) as error:  # numba is not there, refuses this numpy, or misses a library
    compiled_resize = None  # type: ignore[assignment]
    _OBSTACLE = str(error)

Size = tuple[int, int]
Rule = Callable[[int, int, int, int], bool]  # of a picture's width and height, and the new ones: columns first?

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
            pixels = compiled_resize.read_only(np.asarray(image))
        if order(*image.size, *size):
            cut(compiled_resize.columns_first(pixels, size), tiles, columns)
        else:
            compiled_resize.rows_first(pixels, size, tiles.reshape(-1, side * 3), columns)


def _extreme(size: Size, target: Size) -> bool:
    shrinks = any(side > SHRINK * new_side for side, new_side in zip(size, target, strict=True))
    return shrinks or max(size) > LONGEST_SIDE or size[0] * size[1] > MOST_PIXELS


def cut(pixels: np.ndarray, tiles: np.ndarray, columns: int) -> None:
    """Copy uint8 ``[rows * side, columns * side, 3]`` to tiles, row by row."""
    side = tiles.shape[1]
    grid = tiles.reshape(-1, columns, side, side, 3)
    grid[...] = pixels.reshape(-1, side, columns, side, 3).transpose(0, 2, 1, 3, 4)


def _never(width: int, height: int, new_width: int, new_height: int) -> bool:
    return False


def _if_it_shrinks_far_more(width: int, height: int, new_width: int, new_height: int) -> bool:
    return height > new_height and height - new_height > 2 * (width - new_width)


@lru_cache(maxsize=1)
def pass_order() -> Rule | None:
    """When the Pillow that is installed resizes along columns first, by width, height, new width and new height.

    The order matters for the last bit, and is not the same in all versions: whichever rule agrees with Pillow on
    small pictures is taken. None means that Pillow itself has to be used: neither rule agrees, or nothing can be
    compiled. Trying compiles all that pictures need. The log says once which it is.
    """
    if compiled_resize is None:
        logger.warning('Pictures are resized by Pillow, which takes twice as long as numba would (%s).', _OBSTACLE)
        return None
    try:
        rules = _rules_of_pillow()
    except Exception as error:  # what numba has kept is damaged or somebody else's, or the disk is full
        logger.warning(
            'Pictures are resized by Pillow, which takes twice as long as numba would (%s: %s). Empty the folder that '
            'NUMBA_CACHE_DIR names, or let it name none.',
            type(error).__name__,
            error,
        )
        return None
    if not rules:
        logger.warning('This Pillow resizes in a way of its own: pictures are left to it, which takes twice as long.')
        return None
    logger.info('Pictures are resized by compiled code, with the pixels of Pillow %s.', PIL.__version__)
    return rules[0]


def _rules_of_pillow() -> list[Rule]:
    """Return the rules by which the compiled passes give Pillow's pixels of small pictures."""
    rng = np.random.default_rng(0)
    sizes = [((20, 60), (10, height)) for height in (20, 39, 40, 41, 59, 60, 70)]
    sizes += [((10, 60), (20, height)) for height in (20, 59, 70)]
    sizes += [((60, 20), (30, 10)), ((20, 20), (10, 10)), ((20, 20), (40, 40))]
    rules: list[Rule] = [_never, _if_it_shrinks_far_more]
    for (width, height), size in sizes:
        noise = rng.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)
        image = Image.fromarray(noise)
        expected, pixels = np.asarray(image.resize(size)), compiled_resize.read_only(np.asarray(image))
        out = np.empty((size[1], size[0] * 3), np.uint8)
        results = {
            False: compiled_resize.rows_first(pixels, size, out).reshape(expected.shape),
            True: compiled_resize.columns_first(pixels, size),
        }
        rules = [rule for rule in rules if np.array_equal(results[rule(width, height, *size)], expected)]
    return rules
