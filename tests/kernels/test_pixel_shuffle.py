"""Pixel shuffle with LayerNorm against its formula, one row at a time in float64."""

from math import isqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_vico.kernels.implementation import TRITON, implementation
from lmdeploy_vico.kernels.pixel_shuffle import Norm, pixel_shuffle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6
both = pytest.mark.usefixtures('kernels')


def merged(tile: np.ndarray, ratio: int) -> np.ndarray:
    """``[side * side, D]`` to ``[(side / ratio) ** 2, ratio * ratio * D]``."""
    side = isqrt(len(tile))
    rows = []
    for i in range(side // ratio):
        for j in range(side // ratio):
            square = [(ratio * i + dy, ratio * j + dx) for dy in range(ratio) for dx in range(ratio)]
            rows.append(np.concatenate([tile[y * side + x] for y, x in square]))
    return np.stack(rows)


def reference(tiles: list[np.ndarray], ratio: int, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    rows = [row for tile in tiles for row in merged(tile, ratio)]
    normed = [(row - row.mean()) / np.sqrt(row.var() + eps) * weight + bias for row in rows]
    return np.reshape(normed, (len(rows), len(weight)))


@pytest.fixture(scope='session')
def norms_of(device):
    """``norms_of(width, dtype, rng)``: the norms of full and of compressed tiles."""

    def make(width, dtype, rng):
        def part(size):
            return torch.from_numpy(rng.standard_normal(size)).to(device, dtype)

        return Norm(part(4 * width), part(4 * width)), Norm(part(16 * width), part(16 * width))

    return make


@pytest.fixture(scope='session')
def check(float64, assert_close):
    """``check(x, kinds, norms, eps, room)``: rows, counts, and rows without a tile.

    The Triton kernel leaves those as they were allocated, plain torch makes them zero.
    """

    def run(x, kinds, norms, eps=EPS, room=None, compressed=None):
        if compressed is None:
            compressed = torch.tensor(kinds, dtype=torch.bool, device=x.device)
        result = pixel_shuffle(x, compressed, *norms, eps, room)
        assert result.counts.dtype == torch.int32
        assert result.counts.tolist() == [kinds.count(False), kinds.count(True)]
        for branch, out, ratio, norm in zip((False, True), result[:2], (2, 4), norms, strict=True):
            space = len(x) if room is None else room[branch]
            tiles = [tile for tile, kind in zip(float64(x), kinds, strict=True) if kind == branch][:space]
            assert out.dtype == x.dtype
            assert out.shape == (space * x.shape[1] // ratio**2, ratio**2 * x.shape[2])
            expected = reference(tiles, ratio, float64(norm.weight), float64(norm.bias), eps)
            assert_close(out[: len(expected)], expected)
            rest = out[len(expected) :]
            assert rest.isnan().all() if implementation(x.device) == TRITON else not rest.any()

    return run


@pytest.mark.long
@both
@settings(settings.get_profile('kernels'))
@given(
    kinds=st.lists(st.booleans(), min_size=1, max_size=6),
    side=st.sampled_from([4, 8, 12]),
    width=st.integers(8, 100),
    dtype=st.sampled_from(DTYPES),
    float_norms=st.booleans(),
    class_token=st.sampled_from([0, 1]),
    gap=st.sampled_from([0, 1, 16]),
    mean=st.sampled_from([0.0, 100.0]),
    eps=st.sampled_from([1e-6, 1e-2]),
    room=st.none() | st.tuples(st.integers(0, 7), st.integers(0, 7)),
    seed=st.integers(0, 999),
)
def test_random(
    inside, norms_of, check, kinds, side, width, dtype, float_norms, class_token, gap, mean, eps, room, seed
):
    rng = np.random.default_rng(seed)
    values = mean + rng.standard_normal((len(kinds), side * side, width))
    x = inside(values, dtype, (0, class_token, 0), (0, 0, gap))
    check(x, kinds, norms_of(width, torch.float32 if float_norms else dtype, rng), eps, room)


@both
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'kinds, side, width', [([True, False], 8, 1024), ([False, True], 4, 3200), ([True, False, True], 4, 520)]
)
def test_sizes_of_models(inside, norms_of, check, rng, kinds, side, width, dtype):
    x = inside(rng.standard_normal((len(kinds), side * side, width)), dtype, (0, 1, 0), (0, 0, 0))
    check(x, kinds, norms_of(width, dtype, rng))


@both
@pytest.mark.parametrize('kinds', [[False] * 5, [True] * 5], ids=['all full', 'all compressed'])
@pytest.mark.parametrize('room', [None, (5, 0), (0, 5), (2, 3)])
def test_one_kind_only(inside, norms_of, check, rng, kinds, room):
    x = inside(rng.standard_normal((5, 64, 24)), torch.float32, (0, 0, 0), (0, 0, 0))
    check(x, kinds, norms_of(24, torch.float32, rng), room=room)


@both
@pytest.mark.parametrize('room', [None, (2, 1)])
def test_no_tiles(inside, norms_of, check, rng, room):
    x = inside(np.zeros((0, 16, 24)), torch.float32, (0, 0, 0), (0, 0, 0))
    check(x, [], norms_of(24, torch.float32, rng), room=room)


@both
@pytest.mark.parametrize('width', [24, 700])
def test_a_large_mean_costs_no_accuracy(inside, norms_of, check, rng, width):
    # As a mean of squares less a squared mean, the variance would be off by more than the tolerance.
    x = inside(100 + rng.standard_normal((2, 16, width)), torch.float32, (0, 0, 0), (0, 0, 0))
    check(x, [True, False], norms_of(width, torch.float32, rng))


@both
def test_many_tiles(inside, norms_of, check, rng):
    kinds = (rng.random(300) < 0.4).tolist()  # more than a kernel looks at in one step when it counts them
    x = inside(rng.standard_normal((300, 16, 8)), torch.float32, (0, 0, 0), (0, 0, 0))
    check(x, kinds, norms_of(8, torch.float32, rng))


@both
@pytest.mark.parametrize(
    'dtype, weight, bias',
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_norms_of_another_dtype(inside, norms_of, check, refused_or_right, rng, dtype, weight, bias):
    x = inside(rng.standard_normal((2, 16, 24)), dtype, (0, 0, 0), (0, 0, 0))
    norms = [Norm(norm.weight.to(weight), norm.bias.to(bias)) for norm in norms_of(24, torch.float32, rng)]
    with refused_or_right('full_norm.'):
        check(x, [False, True], norms)


@both
def test_every_other_flag(inside, norms_of, check, refused_or_right, device, rng):
    x = inside(rng.standard_normal((4, 16, 24)), torch.float32, (0, 0, 0), (0, 0, 0))
    flags = torch.tensor([True, False, False, True, True, False, False, True], device=device)[::2]
    with refused_or_right('compressed: '):
        check(x, [True, False, True, False], norms_of(24, torch.float32, rng), compressed=flags)


def rows_of(result, kinds, place):
    """The rows of one tile among those of its kind."""
    out = result.compressed if kinds[place] else result.full
    rows = len(out) // len(kinds)
    first = rows * kinds[:place].count(kinds[place])
    return out[first : first + rows]


@both
@pytest.mark.filterwarnings('ignore:invalid value')  # numpy's, in the interpreter
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('side, width', [(8, 40), (4, 1100)])
@pytest.mark.parametrize('kind', [False, True], ids=['full', 'compressed'])
def test_a_tile_knows_nothing_of_the_others(inside, norms_of, device, rng, kind, side, width, dtype):
    tiles = inside(rng.standard_normal((4, side * side, width)), dtype, (0, 1, 0), (0, 0, 0))
    norms = norms_of(width, dtype, rng)

    def shuffle(x, kinds, place):
        return rows_of(pixel_shuffle(x, torch.tensor(kinds, device=device), *norms, EPS), kinds, place)

    expected = shuffle(tiles, [kind, True, False, False], 0)
    for place, kinds in ((1, [True, kind, True, False]), (3, [False, False, True, kind]), (2, [kind] * 4)):
        others = torch.full_like(tiles, float('nan'))
        others[place] = tiles[0]
        assert torch.equal(shuffle(others, kinds, place), expected)


WEIGHT, LONG = torch.rand(32), torch.rand(128)  # of the norms of D = 8
BAD = {
    'x: two dimensions': {'x': torch.rand(16, 8)},
    'x: float64': {'x': torch.rand(3, 16, 8).double()},
    'x: integers': {'x': torch.ones(3, 16, 8, dtype=torch.int32)},
    'x: not a square': {'x': torch.rand(3, 32, 8)},
    'x: a side of 6': {'x': torch.rand(3, 36, 8)},
    'x: no patches': {'x': torch.rand(3, 0, 8)},
    'x: strided channels': {'x': torch.rand(3, 8, 16).transpose(1, 2)},
    'compressed: not bool': {'compressed': torch.zeros(3, dtype=torch.uint8)},
    'compressed: of more tiles': {'compressed': torch.zeros(4, dtype=torch.bool)},
    'compressed: two dimensions': {'compressed': torch.zeros(3, 1, dtype=torch.bool)},
    'compressed: another device': {'compressed': torch.zeros(3, dtype=torch.bool, device='meta')},
    'full_norm.weight: too short': {'full_norm': Norm(WEIGHT[1:], WEIGHT)},
    'full_norm.bias: of compressed tiles': {'full_norm': Norm(WEIGHT, LONG)},
    'full_norm.weight: float64': {'full_norm': Norm(WEIGHT.double(), WEIGHT)},
    'full_norm.bias: integers': {'full_norm': Norm(WEIGHT, WEIGHT.int())},
    'full_norm.weight: another device': {'full_norm': Norm(WEIGHT.to('meta'), WEIGHT)},
    'full_norm.bias: strided': {'full_norm': Norm(WEIGHT, torch.rand(64)[::2])},
    'compressed_norm.bias: too short': {'compressed_norm': Norm(LONG, LONG[1:])},
    'compressed_norm.weight: two dimensions': {'compressed_norm': Norm(LONG[None], LONG)},
    'compressed_norm.bias: float64': {'compressed_norm': Norm(LONG, LONG.double())},
    'compressed_norm.bias: another device': {'compressed_norm': Norm(LONG, LONG.to('meta'))},
    'compressed_norm.weight: strided': {'compressed_norm': Norm(torch.rand(256)[::2], LONG)},
    'room: negative': {'room': (1, -1)},
    'room: one number': {'room': (3,)},
    'room: more than memory holds': {'room': (2**40, 1)},
}


@both
@pytest.mark.parametrize('case', BAD)
def test_names_a_bad_argument(case):
    arguments = {
        'x': torch.rand(3, 16, 8),
        'compressed': torch.zeros(3, dtype=torch.bool),
        'full_norm': Norm(WEIGHT, WEIGHT),
        'compressed_norm': Norm(LONG, LONG),
        'eps': EPS,
    } | BAD[case]
    with pytest.raises(ValueError, match=f'^{case.split(":")[0]}: '):
        pixel_shuffle(**arguments)
