"""Linear layers of few rows against float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_vico.kernels.linear import linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
erf = np.vectorize(math.erf, otypes=[float])
both = pytest.mark.usefixtures('kernels')


def reference(a, w, bias, gelu):
    out = np.einsum('gmk,gnk->gmn', a, w) + (0 if bias is None else bias)
    return 0.5 * out * (1 + erf(out / np.sqrt(2))) if gelu else out


@pytest.mark.long
@both
@settings(settings.get_profile('kernels'), max_examples=60)
@given(
    groups=st.integers(1, 4),
    rows=st.integers(1, 70),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    gelu=st.booleans(),
    outputs_contiguous=st.booleans(),
    gap=st.sampled_from([0, 1, 8]),
    seed=st.integers(0, 999),
)
def test_random(
    inside, float64, assert_close, device,
    groups, rows, inputs, outputs, dtype, biased, gelu, outputs_contiguous, gap, seed,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    a = inside(rng.standard_normal((groups, rows, inputs)), torch.float32, (0, 1, 0), (1, 0, gap))
    values = rng.standard_normal((groups, outputs, inputs))
    if outputs_contiguous:
        w = inside(values.swapaxes(1, 2), dtype, (0, 0, 0), (0, 1, gap)).transpose(1, 2)
    else:
        w = inside(values, dtype, (0, 0, 0), (0, 1, gap))
    bias = torch.from_numpy(rng.standard_normal(outputs)).to(device, dtype) if biased else None
    out = linear(a, w, bias, gelu)
    assert out.dtype == torch.float32
    expected = reference(float64(a), float64(w), None if bias is None else float64(bias), gelu)
    # 16-bit weights cost no accuracy but that of splitting the rows in two: 16 bits of bfloat16, 22 of float16.
    error = np.linalg.norm(float64(out) - expected)
    assert error <= (3e-5 if dtype == torch.bfloat16 else 1e-5) * np.linalg.norm(expected) + 1e-12
    assert_close(out, expected, dtype)


@both
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('rows, inputs, outputs', [(8, 1024, 48), (2, 4096, 32), (40, 1024, 32), (1, 3200, 2)])
def test_sizes_of_models(inside, float64, assert_close, rng, rows, inputs, outputs, dtype):
    a = inside(rng.standard_normal((1, rows, inputs)), torch.float32, (0, 0, 0), (0, 0, 0))[0]
    w = inside(rng.standard_normal((1, outputs, inputs)), dtype, (0, 0, 0), (0, 0, 0))[0]
    assert_close(linear(a, w), reference(float64(a)[None], float64(w)[None], None, False)[0], dtype)


@both
@pytest.mark.parametrize('head', [64, 200])
def test_heads(inside, float64, assert_close, rng, head):
    """The router's projections by head, as it calls them: through transposed views."""
    rows, heads, width = 3, 4, 4 * head
    weight = inside(rng.standard_normal((heads, head, width)), torch.bfloat16, (0, 0, 0), (0, 0, 0))
    query = inside(rng.standard_normal((rows, heads, head)), torch.float32, (0, 0, 0), (0, 0, 0)).transpose(0, 1)
    absorbed = linear(query, weight.transpose(1, 2))
    assert_close(absorbed, reference(float64(query), float64(weight).swapaxes(1, 2), None, False))
    context = absorbed.transpose(0, 1)
    assert context.is_contiguous()
    assert_close(linear(context.transpose(0, 1), weight), reference(float64(absorbed), float64(weight), None, False))


@both
@pytest.mark.parametrize('rows', [8, 32])  # on a CPU, torch's products of odd heights treat their last rows differently
def test_a_row_knows_nothing_of_the_others(inside, rng, rows, rows_apart):
    a = inside(rng.standard_normal((1, rows, 600)), torch.float32, (0, 0, 0), (0, 0, 0))[0]
    w = inside(rng.standard_normal((1, 20, 600)), torch.bfloat16, (0, 0, 0), (0, 0, 0))[0]
    before = linear(a, w, gelu=True)
    order = torch.from_numpy(rng.permutation(rows)).to(a.device)
    assert torch.equal(linear(a[order], w, gelu=True), before[order])
    others = torch.full_like(a, 1e3)
    others[-1] = a[1]
    assert torch.equal(linear(others, w, gelu=True)[-1], before[1])


BAD = {
    'a: one dimension': {'a': torch.rand(32)},
    'a: bfloat16': {'a': torch.rand(3, 32).bfloat16()},
    'a: no rows': {'a': torch.rand(0, 32)},
    'a: strided inputs': {'a': torch.rand(32, 3).T},
    'w: another width': {'w': torch.rand(8, 31)},
    'w: groups': {'w': torch.rand(2, 8, 32)},
    'w: other groups': {'a': torch.rand(3, 3, 32), 'w': torch.rand(2, 8, 32), 'bias': None},
    'w: integers': {'w': torch.ones(8, 32, dtype=torch.int32)},
    'w: no outputs': {'w': torch.rand(0, 32), 'bias': None},
    'w: strided both ways': {'w': torch.rand(16, 64)[::2, ::2]},
    'w: another device': {'w': torch.rand(8, 32, device='meta')},
    'bias: another length': {'bias': torch.rand(7)},
    'bias: strided': {'bias': torch.rand(16)[::2]},
    'bias: another device': {'bias': torch.rand(8, device='meta')},
}


@both
@pytest.mark.parametrize('case', BAD)
def test_names_a_bad_argument(case):
    arguments = {'a': torch.rand(3, 32), 'w': torch.rand(8, 32), 'bias': torch.rand(8)} | BAD[case]
    with pytest.raises(ValueError, match=f'^{case.split(":")[0]}: '):
        linear(**arguments)
