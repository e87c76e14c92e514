"""Attention pooling against its formula, one tile and head at a time in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_vico.kernels.attention_pool import attention_pool, split_count

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
both = pytest.mark.usefixtures('kernels')


def reference(x: np.ndarray, u: np.ndarray, scale: float) -> np.ndarray:
    contexts = []
    for tile, queries in zip(x, np.broadcast_to(u, (len(x), *u.shape[1:])), strict=True):
        for query in queries:
            logits = scale * (tile @ query)
            weights = np.exp(logits - logits.max())
            contexts.append(weights @ tile / weights.sum())
    return np.reshape(contexts, (len(x), u.shape[1], x.shape[2]))


@pytest.fixture(scope='session')
def queries_of(inside):
    """``queries_of(values, dtype, layout)``: ``[B, H, D]`` with the strides of the layout."""

    def make(values, dtype, layout):
        if layout == 'heads first':
            return inside(values.swapaxes(0, 1), dtype, (0, 0, 0), (0, 0, 0)).transpose(0, 1)
        if layout == 'gaps':
            return inside(values, dtype, (0, 1, 0), (1, 2, 5))
        return inside(values, dtype, (0, 0, 0), (0, 0, 0))

    return make


@pytest.mark.long
@both
@settings(settings.get_profile('kernels'), max_examples=60)
@given(
    tiles=st.integers(1, 5),
    tokens=st.integers(1, 200),
    width=st.integers(16, 160),
    heads=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    float_queries=st.booleans(),
    one_query=st.booleans(),
    class_token=st.sampled_from([0, 1]),
    gap=st.sampled_from([0, 1, 16]),
    layout=st.sampled_from(['plain', 'heads first', 'gaps']),
    sharpness=st.sampled_from([1.0, -1.0, 4.0, 0.0]),
    seed=st.integers(0, 999),
)
def test_random(
    inside, queries_of, float64, assert_close,
    tiles, tokens, width, heads, dtype, float_queries, one_query, class_token, gap, layout, sharpness, seed,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    x = inside(rng.standard_normal((tiles, tokens, width)), dtype, (0, class_token, 0), (0, 0, gap))
    values = rng.standard_normal((1 if one_query else tiles, heads, width))
    u = queries_of(values, torch.float32 if float_queries else dtype, layout)
    scale = sharpness * width**-0.5
    out = attention_pool(x, u, scale)
    assert out.dtype == torch.float32
    assert_close(out, reference(float64(x), float64(u), scale), dtype)


@both
@pytest.mark.parametrize(
    'tiles, tokens, width, dtype',
    [
        (1, 100, 1024, torch.bfloat16),
        (2, 73, 1024, torch.float16),
        (2, 73, 1024, torch.float32),
        (1, 100, 1024, torch.float32),
        (1, 71, 3200, torch.bfloat16),
        (2, 97, 3200, torch.float16),
        (1, 70, 3200, torch.float32),
        (1, 1024, 64, torch.bfloat16),
        (1, 1024, 64, torch.float32),
        (1, 500, 2000, torch.bfloat16),
    ],
)
def test_sizes_of_models(inside, float64, assert_close, rng, tiles, tokens, width, dtype):
    x = inside(rng.standard_normal((tiles, tokens, width)), dtype, (0, 1, 0), (0, 0, 0))
    u = inside(rng.standard_normal((1, 16, width)), torch.float32, (0, 0, 0), (0, 0, 0))
    scale = 2 * width**-0.5
    assert_close(attention_pool(x, u, scale), reference(float64(x), float64(u), scale), dtype)


@pytest.fixture
def marked(inside, rng):
    """``marked(marks, width, dtype)``: tokens whose first channel is their mark, and queries that read just this one.

    So the logits are exact in every dtype, whatever their size.
    """

    def make(marks, width, dtype):
        x = rng.standard_normal((1, len(marks), width))
        x[..., 0] = marks
        u = np.zeros((1, 3, width))
        u[..., 0] = [1e4, -1e4, 0]
        return (inside(values, dtype, (0, 0, 0), (0, 0, 0)) for values in (x, u))

    return make


@both
@pytest.mark.parametrize('width', [64, 1100])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'marks',
    [
        np.ones(200),
        -np.ones(200),
        np.resize([1, -1, -1], 200),
        np.repeat([-1, 1], 100),
        np.repeat([1, -1], [1, 199]),
        np.repeat([-1, 1], [199, 1]),
    ],
    ids=['all 1e4', 'all -1e4', 'mixed', 'second half', 'first token', 'last token'],
)
def test_extreme_logits(marked, float64, assert_close, marks, width, dtype):
    x, u = marked(marks, width, dtype)
    out = attention_pool(x, u)
    assert out.isfinite().all()
    assert_close(out, reference(float64(x), float64(u), 1.0), dtype)


@both
@pytest.mark.parametrize('width', [64, 1100])
@pytest.mark.parametrize('place', [0, 31, 32, 150, 199])
def test_a_dominant_token_is_the_result(marked, float64, assert_close, rng, place, width):
    marks = rng.uniform(-1e-4, 1e-4, 200)
    marks[place] = 1
    x, u = marked(marks, width, torch.float32)
    assert_close(attention_pool(x, u)[0, 0], float64(x[0, place]))


@both
@pytest.mark.parametrize('width', [64, 1100])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_float32_queries_are_not_rounded(inside, float64, assert_close, width, dtype):
    """Logits 4 and 4 + 2 ** -10, too close for either 16-bit type."""
    x, u = np.zeros((1, 2, width)), np.zeros((1, 1, width))
    x[0, [0, 1], [0, 1]] = 1
    u[0, 0, :2] = 4, 4 + 2**-10
    x, u = inside(x, dtype, (0, 0, 0), (0, 0, 0)), inside(u, torch.float32, (0, 0, 0), (0, 0, 0))
    assert_close(attention_pool(x, u), reference(float64(x), float64(u), 1.0), dtype)


@both
@pytest.mark.filterwarnings('ignore:(All-NaN|invalid|overflow)')  # numpy's, in the interpreter
@pytest.mark.parametrize('width', [64, 1100])
@pytest.mark.parametrize('scale', [1.0, 1e-4])
def test_float16_queries_up_to_its_range(inside, float64, assert_close, rng, scale, width):
    values = rng.standard_normal((1, 50, width))
    values[..., 0] = np.resize([1, -1], 50)
    x = inside(values, torch.float16, (0, 0, 0), (0, 0, 0))
    u = torch.zeros(1, 2, width, dtype=torch.float16, device=x.device)
    u[0, :, 0] = torch.tensor([60000, -60000])
    assert_close(attention_pool(x, u, scale), reference(float64(x), float64(u), scale), torch.float16)


@both
@pytest.mark.filterwarnings('ignore:All-NaN slice')  # numpy's, in the interpreter
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('tokens, width', [(150, 48), (70, 1040)])
def test_a_tile_knows_nothing_of_the_others(inside, rng, tokens, width, dtype):
    x = inside(rng.standard_normal((4, tokens, width)), dtype, (0, 1, 0), (0, 0, 0))
    u = inside(rng.standard_normal((4, 16, width)), torch.float32, (0, 0, 0), (0, 0, 0))
    before = attention_pool(x, u)
    order = torch.tensor([2, 0, 3, 1], device=x.device)
    assert torch.equal(attention_pool(x[order], u[order]), before[order])
    for place in (0, 3):
        others_x, others_u = torch.full_like(x, float('nan')), torch.full_like(u, float('nan'))
        others_x[place], others_u[place] = x[1], u[1]
        assert torch.equal(attention_pool(others_x, others_u)[place], before[1])


BAD = {
    'x: two dimensions': {'x': torch.rand(9, 32)},
    'x: no tokens': {'x': torch.rand(3, 0, 32)},
    'x: no tiles': {'x': torch.rand(0, 9, 32), 'u': torch.rand(1, 4, 32)},
    'x: float64': {'x': torch.rand(3, 9, 32).double()},
    'x: integers': {'x': torch.ones(3, 9, 32, dtype=torch.int32)},
    'x: strided channels': {'x': torch.rand(3, 32, 9).transpose(1, 2)},
    'u: two dimensions': {'u': torch.rand(4, 32)},
    'u: another width': {'u': torch.rand(3, 4, 31)},
    'u: another number of tiles': {'u': torch.rand(2, 4, 32)},
    'u: float64': {'u': torch.rand(3, 4, 32).double()},
    'u: narrower than x': {'u': torch.rand(3, 4, 32).bfloat16()},
    'u: the other 16-bit type': {'x': torch.rand(3, 9, 32).bfloat16(), 'u': torch.rand(3, 4, 32).half()},
    'u: another device': {'u': torch.rand(3, 4, 32, device='meta')},
    'u: channels first': {'u': torch.rand(3, 32, 4).transpose(1, 2)},
    'u: every other channel': {'u': torch.rand(3, 4, 64)[..., ::2]},
}


@both
@pytest.mark.parametrize('case', BAD)
def test_names_a_bad_argument(case):
    arguments = {'x': torch.rand(3, 9, 32), 'u': torch.rand(3, 4, 32)} | BAD[case]
    with pytest.raises(ValueError, match=f'^{case.split(":")[0]}: '):
        attention_pool(**arguments)


def test_no_split_is_empty():
    for tiles in (1, 2, 5, 13, 40):
        for programs in (1, 8, 25):
            for slots in (8, 24, 132, 396):
                for blocks in (*range(1, 40), 64, 65, 97, 128):
                    splits = split_count(tiles, blocks, programs, slots)
                    assert 1 <= splits <= blocks
                    # As the kernels divide them: each split but the last has this many blocks.
                    each = -(-blocks // splits)
                    assert (splits - 1) * each < blocks


def test_splits_keep_an_idle_device_busy():
    assert split_count(tiles=1, blocks=32, programs_per_tile=1, slots=132) > 1
    assert split_count(tiles=132, blocks=32, programs_per_tile=1, slots=132) == 1
    assert split_count(tiles=1, blocks=32, programs_per_tile=132, slots=132) == 1
