"""The pictures that are benchmarked: made from a seed, compressed as JPEG, the same on every machine.

``smooth`` has little detail and decodes quickly, like a blurred background; ``noisy`` is random pixels, the most that a
JPEG of this quality can hold. A photograph lies between them. ``varied`` is both in turn, each picture of another size,
as requests bring them: whatever is worked out for a size is worked out again. No two pictures of a run are the same.
"""

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image

CONTENTS = ('smooth', 'noisy')
KINDS = (*CONTENTS, 'varied')
MIXES = (*CONTENTS, 'mix', 'varied')
SIZE = (1500, 1500)  # nine tiles and a thumbnail
SIDES = (1200, 1900)  # the shortest and the longest side of a varied picture
SQUARE = 9 / 8  # the largest ratio of their sides, so that they too become nine tiles and a thumbnail
QUALITY = 90
SEED = 11
CELLS = 12  # along a side of a smooth picture


@lru_cache(maxsize=512)
def jpeg(kind: str, index: int, size: tuple[int, int] | None = None) -> bytes:
    """The ``index``-th picture of a kind, of (width, height) or of the kind's own size, as a JPEG file."""
    content = CONTENTS[index % len(CONTENTS)] if kind == 'varied' else kind
    width, height = size or (varied_size(index) if kind == 'varied' else SIZE)
    rng = np.random.default_rng([SEED, KINDS.index(kind), index])
    side = (CELLS, CELLS) if content == 'smooth' else (height, width)
    picture = Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8))
    if content == 'smooth':
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    file = BytesIO()
    picture.save(file, 'JPEG', quality=QUALITY)
    return file.getvalue()


def varied_size(index: int) -> tuple[int, int]:
    """Width and height of the ``index``-th varied picture."""
    rng = np.random.default_rng([SEED, index])
    while True:
        width, height = map(int, rng.integers(SIDES[0], SIDES[1], 2, endpoint=True))
        if max(width, height) <= SQUARE * min(width, height):
            return width, height


def jpegs(mix: str, count: int, size: tuple[int, int] | None = None, first: int = 0) -> list[bytes]:
    """So many pictures of one kind, or smooth and noisy ones in turn where ``mix`` is "mix"."""
    kinds = CONTENTS if mix == 'mix' else (mix,)
    return [jpeg(kinds[index % len(kinds)], index, size) for index in range(first, first + count)]


def recipe() -> dict[str, object]:
    """What the pictures are made from, for the results."""
    sizes = {'size': SIZE, 'varied_sides': SIDES, 'varied_square': SQUARE}
    return {**sizes, 'jpeg_quality': QUALITY, 'seed': SEED, 'cells_of_smooth': CELLS}
