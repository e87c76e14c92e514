"""Which tiles of a sample are compressed in training: drawn for a place in the run, whoever comes by there.

All draws depend on the seed and the place alone. So a run that is resumed, or spread over more processes, sees the
same.
"""

from functools import lru_cache

import numpy as np

WARM_UP_SHARE = 1.0  # while mlp2 alone is trained, every tile is compressed


def draw_share(seed: int, place: int) -> float:
    """Return xi of Eq. 1, uniform in [0, 1]."""
    return float(_generator(seed, place).random())


def draw_tiles(seed: int, place: int, tiles: int, share: float) -> np.ndarray:
    """Choose round(share * tiles) of a sample's tiles, halves rounded up; bool ``[tiles]``."""
    chosen = np.zeros(tiles, dtype=bool)
    count = int(share * tiles + 0.5)
    chosen[_generator(seed, place, 1).permutation(tiles)[:count]] = True
    return chosen


def draw_tile(seed: int, place: int, tiles: int) -> int:
    """Choose the one tile that a router's sample is judged by (paper, section 3.2)."""
    return int(_generator(seed, place, 2).integers(tiles))


def one_tile(tiles: int, tile: int | None) -> np.ndarray:
    """That tile alone compressed, or none; bool ``[tiles]``."""
    return np.arange(tiles) == (-1 if tile is None else tile)


def draw_sample(seed: int, place: int, samples: int) -> int:
    """The sample at a place: every pass over the data has an order of its own."""
    turn, index = divmod(place, samples)
    return int(_order(seed, turn, samples)[index])


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


@lru_cache(maxsize=2)  # a run goes through one pass after another
def _order(seed: int, turn: int, samples: int) -> np.ndarray:
    return _generator(seed, turn, 3).permutation(samples)
