"""The pictures that are benchmarked: made from a seed, compressed as JPEG, the same on every machine.

``smooth`` has little detail and decodes quickly, like a blurred background; ``noisy`` is random pixels, the most that a
JPEG of this quality can hold. A photograph lies between them. No two pictures of a run are the same.
"""

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image

KINDS = ('smooth', 'noisy')
SIZE = (1500, 1500)  # nine tiles and a thumbnail
QUALITY = 90
SEED = 11
CELLS = 12  # along a side of a smooth picture


@lru_cache(maxsize=512)
def jpeg(kind: str, index: int, size: tuple[int, int] = SIZE) -> bytes:
    """The ``index``-th picture of a kind, of (width, height), as a JPEG file."""
    width, height = size
    rng = np.random.default_rng([SEED, KINDS.index(kind), index])
    side = (CELLS, CELLS) if kind == 'smooth' else (height, width)
    picture = Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8))
    if kind == 'smooth':
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    file = BytesIO()
    picture.save(file, 'JPEG', quality=QUALITY)
    return file.getvalue()


def jpegs(mix: str, count: int, size: tuple[int, int] = SIZE, first: int = 0) -> list[bytes]:
    """So many pictures of one kind, or of both in turn where ``mix`` is "mix"."""
    kinds = KINDS if mix == 'mix' else (mix,)
    return [jpeg(kinds[index % len(kinds)], index, size) for index in range(first, first + count)]


def recipe() -> dict[str, object]:
    """What the pictures are made from, for the results."""
    return {'size': SIZE, 'jpeg_quality': QUALITY, 'seed': SEED, 'cells_of_smooth': CELLS}
