"""Residual and norm against their formula, row by row in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_vico.kernels.residual_norm import norm, residual_norm, residual_norm_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6
both = pytest.mark.usefixtures('kernels')


def normalised(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> np.ndarray:
    """The norm of rows ``[..., D]``: a LayerNorm with a bias, an RMSNorm without."""
    if bias is None:
        return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + eps) * weight
    mean = rows.mean(-1, keepdims=True)
    return (rows - mean) / np.sqrt(((rows - mean) ** 2).mean(-1, keepdims=True) + eps) * weight + bias


@pytest.fixture(scope='session')
def channels(device):
    """``channels(width, dtype, rng)``: one value a channel."""
    return lambda width, dtype, rng: torch.from_numpy(rng.standard_normal(width)).to(device, dtype)


@pytest.fixture(scope='session')
def check(float64, assert_close):
    """``check(x, delta, scale, weight, bias, eps)``: the sum, and the norm of the sum as it was returned."""

    def run(x, delta, scale, weight, bias, eps=EPS):
        h, y = residual_norm(x, delta, scale, weight, bias, eps)
        for out in (h, y):
            assert out.dtype == x.dtype
            assert out.is_contiguous()
        assert_close(h, float64(x) + float64(delta) * float64(scale))
        assert_close(y, normalised(float64(h), float64(weight), None if bias is None else float64(bias), eps))

    return run


@both
@settings(settings.get_profile('kernels'), max_examples=60)
@given(
    tiles=st.integers(1, 4),
    tokens=st.integers(1, 5),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    weights=st.sampled_from(DTYPES),
    layer_norm=st.booleans(),
    skipped=st.sampled_from([0, 1]),
    gaps=st.tuples(st.sampled_from([0, 1, 16]), st.sampled_from([0, 3])),
    mean=st.sampled_from([0.0, 100.0]),
    eps=st.sampled_from([1e-6, 1e-2]),
    seed=st.integers(0, 999),
)
def test_random(
    inside, channels, check, tiles, tokens, width, dtype, weights, layer_norm, skipped, gaps, mean, eps, seed
):
    rng = np.random.default_rng(seed)
    shape = (tiles, tokens, width)
    x = inside(mean + rng.standard_normal(shape), dtype, (0, skipped, 0), (0, 0, gaps[0]))
    delta = inside(rng.standard_normal(shape), dtype, (0, 0, gaps[1]), (0, skipped, 0))
    scale, weight = channels(width, weights, rng), channels(width, dtype, rng)
    check(x, delta, scale, weight, channels(width, weights, rng) if layer_norm else None, eps)


@both
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('width, layer_norm', [(1024, True), (3200, False), (3200, True), (8192, True)])
def test_sizes_of_models(inside, channels, check, rng, width, layer_norm, dtype):
    x, delta = (inside(rng.standard_normal((2, 3, width)), dtype, (0, 0, 0), (0, 0, 0)) for _ in range(2))
    scale, weight, bias = (channels(width, dtype, rng) for _ in range(3))
    check(x, delta, scale, weight, bias if layer_norm else None)


@both
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('width, layer_norm', [(3200, False), (40, False), (7, True)])
def test_q_and_k_where_the_fused_projection_wrote_them(
    inside, channels, float64, assert_close, rng, width, layer_norm, dtype
):
    fused = inside(rng.standard_normal((2, 3, 3 * width)), dtype, (0, 0, 0), (0, 0, 0))
    before = fused.clone()
    bias = channels(width, dtype, rng) if layer_norm else None
    for part in fused.chunk(3, -1)[:2]:
        assert not part.is_contiguous()
        weight = channels(width, dtype, rng)
        out = norm(part, weight, bias, EPS)
        assert out.dtype == dtype
        assert out.is_contiguous()
        expected = normalised(float64(part), float64(weight), None if bias is None else float64(bias), EPS)
        assert_close(out, expected)
    assert torch.equal(fused, before)


@both
@pytest.mark.parametrize('tiles, tokens', [(0, 3), (2, 0)])
@pytest.mark.parametrize('layer_norm', [True, False])
def test_no_rows(inside, channels, rng, tiles, tokens, layer_norm):
    x = inside(np.zeros((tiles, tokens, 24)), torch.float32, (0, 0, 0), (0, 0, 0))
    weight = channels(24, torch.float32, rng)
    h, y = residual_norm(x, x, weight, weight, weight if layer_norm else None, EPS)
    assert h.shape == y.shape == norm(x, weight, None, EPS).shape == (tiles, tokens, 24)


@both
@pytest.mark.parametrize('width', [24, 700])
def test_a_large_mean_costs_no_accuracy(inside, channels, check, rng, width):
    # As a mean of squares less a squared mean, the variance would be off by more than the tolerance.
    x = inside(100 + rng.standard_normal((2, 3, width)), torch.float32, (0, 0, 0), (0, 0, 0))
    delta = inside(rng.standard_normal((2, 3, width)), torch.float32, (0, 0, 0), (0, 0, 0))
    check(x, delta, *(channels(width, torch.float32, rng) for _ in range(3)))


@both
@pytest.mark.parametrize('layer_norm', [True, False])
def test_rows_of_zeros_are_normalised_to_the_bias(inside, channels, rng, layer_norm):
    x = inside(np.zeros((1, 2, 24)), torch.bfloat16, (0, 0, 0), (0, 0, 0))
    scale, weight, bias = (channels(24, torch.bfloat16, rng) for _ in range(3))
    h, y = residual_norm(x, x, scale, weight, bias if layer_norm else None, EPS)
    assert torch.equal(h, torch.zeros_like(x))
    assert torch.equal(y, bias.expand_as(x) if layer_norm else torch.zeros_like(x))


@both
@pytest.mark.filterwarnings('ignore:invalid value')  # numpy's, in the interpreter
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('layer_norm', [True, False])
@pytest.mark.parametrize('width', [40, 1100])
def test_a_row_knows_nothing_of_the_others(inside, channels, rng, width, layer_norm, dtype):
    x, delta = (inside(rng.standard_normal((3, 4, width)), dtype, (0, 0, 0), (0, 0, 0)) for _ in range(2))
    scale, weight, bias = (channels(width, dtype, rng) for _ in range(3))
    bias = bias if layer_norm else None
    row = (slice(0, 1), slice(0, 1))
    expected = residual_norm(x[row], delta[row], scale, weight, bias, EPS)
    alone = norm(x[row], weight, bias, EPS)
    for tile, token in ((0, 0), (1, 2), (2, 3)):
        others = [torch.full_like(x, float('nan')) for _ in range(2)]
        others[0][tile, token], others[1][tile, token] = x[0, 0], delta[0, 0]
        for out, wanted in zip(residual_norm(*others, scale, weight, bias, EPS), expected, strict=True):
            assert torch.equal(out[tile, token], wanted[0, 0])
        assert torch.equal(norm(others[0], weight, bias, EPS)[tile, token], alone[0, 0])


@pytest.mark.parametrize('layer_norm', [True, False])
def test_plain_torch_has_gradients(rng, layer_norm):
    x, delta, scale, weight, bias = (
        torch.from_numpy(rng.standard_normal(shape)).double().requires_grad_()
        for shape in ((2, 3, 8), (2, 3, 8), (8,), (8,), (8,))
    )

    def run(*arguments):
        # In float32 inside, which is too coarse for differences: the same in float64.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, 'float', torch.Tensor.double)
            return residual_norm_torch(*arguments[:4], arguments[4] if layer_norm else None, EPS)

    assert torch.autograd.gradcheck(run, (x, delta, scale, weight, bias))


def test_triton_says_that_it_has_no_gradients(kernels, device):
    x, weight = torch.rand(1, 2, 8, device=device), torch.rand(8, device=device, requires_grad=True)
    if kernels == 'torch':
        assert residual_norm(x, x, weight, weight, None, EPS).y.requires_grad
        return
    for run in (lambda: residual_norm(x, x, weight, weight, None, EPS), lambda: norm(x, weight, None, EPS)):
        with pytest.raises(RuntimeError, match='no gradient'):
            run()
        with torch.no_grad():
            run()


X, CHANNELS = torch.rand(2, 3, 8), torch.rand(8)
BAD = {
    'x: two dimensions': {'x': torch.rand(3, 8)},
    'x: float64': {'x': X.double()},
    'x: strided channels': {'x': torch.rand(2, 8, 3).transpose(1, 2)},
    'x: no channels': {'x': torch.rand(2, 3, 0)},
    'x: more channels than fit': {'x': torch.rand(1, 1, 8193)},
    'delta: another shape': {'delta': torch.rand(2, 4, 8)},
    'delta: another dtype': {'delta': X.bfloat16()},
    'delta: strided channels': {'delta': torch.rand(2, 8, 3).transpose(1, 2)},
    'delta: another device': {'delta': X.to('meta')},
    'scale: too short': {'scale': CHANNELS[1:]},
    'scale: integers': {'scale': CHANNELS.int()},
    'scale: strided': {'scale': torch.rand(16)[::2]},
    'scale: another device': {'scale': CHANNELS.to('meta')},
    'weight: too long': {'weight': torch.rand(9)},
    'weight: two dimensions': {'weight': CHANNELS[None]},
    'weight: strided': {'weight': torch.rand(16)[::2]},
    'bias: too short': {'bias': CHANNELS[1:]},
    'bias: float64': {'bias': CHANNELS.double()},
    'bias: strided': {'bias': torch.rand(16)[::2]},
    'bias: another device': {'bias': CHANNELS.to('meta')},
}


@both
@pytest.mark.parametrize('case', BAD)
def test_names_a_bad_argument(case):
    arguments = {'x': X, 'delta': X, 'scale': CHANNELS, 'weight': CHANNELS, 'bias': CHANNELS, 'eps': EPS} | BAD[case]
    with pytest.raises(ValueError, match=f'^{case.split(":")[0]}: '):
        residual_norm(**arguments)
    if not {'delta', 'scale'} & set(BAD[case]):
        del arguments['delta'], arguments['scale']
        with pytest.raises(ValueError, match=f'^{case.split(":")[0]}: '):
            norm(**arguments)
