"""Gradients of the operations: right in plain torch, refused by the Triton kernels."""

import pytest
import torch

from lmdeploy_vico.kernels.attention_pool import attention_pool, attention_pool_torch
from lmdeploy_vico.kernels.linear import linear, linear_torch
from lmdeploy_vico.kernels.pack import pack
from lmdeploy_vico.kernels.pixel_shuffle import Norm, pixel_shuffle, pixel_shuffle_torch

EPS = 1e-5
MIXED = torch.tensor([False, True, False])


def shuffled(shuffle, room, x, *norms):
    full, compressed = Norm(*norms[:2]), Norm(*norms[2:])
    return shuffle(x, MIXED.to(x.device), full, compressed, EPS, room)[:2]


PLAIN = {
    'attention_pool': (lambda x, u: attention_pool_torch(x, u, 0.3), [(2, 5, 8), (2, 3, 8)]),
    'attention_pool, one query': (lambda x, u: attention_pool_torch(x, u, 0.3), [(2, 5, 8), (1, 3, 8)]),
    'linear': (lambda a, w: linear_torch(a, w, None, False), [(2, 3, 8), (2, 4, 8)]),
    'linear, bias and GELU': (lambda a, w, bias: linear_torch(a, w, bias, True), [(1, 3, 8), (1, 4, 8), (4,)]),
    'pixel_shuffle': (
        lambda *operands: shuffled(pixel_shuffle_torch, (2, 1), *operands),
        [(3, 16, 2), (8,), (8,), (32,), (32,)],
    ),
    'pixel_shuffle, room to spare': (
        lambda *operands: shuffled(pixel_shuffle_torch, (3, 3), *operands),
        [(3, 16, 2), (8,), (8,), (32,), (32,)],
    ),
}


@pytest.mark.parametrize('name', PLAIN)
def test_plain_torch_has_gradients(rng, monkeypatch, name):
    run, shapes = PLAIN[name]
    operands = [torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in shapes]
    # In float32 inside, which is too coarse for differences: the same in float64.
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    assert torch.autograd.gradcheck(run, operands)


def test_rows_to_spare_leave_a_weights_gradient_finite(device):
    """A product's weight gets every row times the gradient of its result, and zero times NaN is NaN."""
    ones = [torch.ones(size, device=device) for size in (8, 8, 32, 32)]
    rows = shuffled(pixel_shuffle_torch, (3, 3), torch.rand(3, 16, 2, device=device), *ones)
    for tokens, written in zip(rows, (2 * 4, 1), strict=True):
        weight = torch.ones(2, tokens.shape[1], device=device, requires_grad=True)
        (tokens @ weight.T)[:written].sum().backward()
        assert weight.grad.isfinite().all()


WRAPPERS = {
    'attention_pool': (attention_pool, [(2, 5, 16), (2, 3, 16)]),
    'linear': (linear, [(3, 16), (4, 16), (4,)]),
    'pixel_shuffle': (
        lambda *operands: torch.cat([rows.flatten() for rows in shuffled(pixel_shuffle, (2, 1), *operands)]),
        [(3, 16, 2), (8,), (8,), (32,), (32,)],
    ),
    'pack': (lambda source: pack(torch.zeros(4, 8, device=source.device), [source], [1]), [(2, 8)]),
}


@pytest.mark.parametrize('name', WRAPPERS)
def test_a_kernel_refuses_what_plain_torch_has(kernels, device, name):
    run, shapes = WRAPPERS[name]
    for chosen in range(len(shapes)):
        operands = [torch.rand(shape, device=device) for shape in shapes]
        operands[chosen].requires_grad_()
        if kernels == 'torch':
            run(*operands).square().sum().backward()
            assert operands[chosen].grad.isfinite().all()
            continue
        with pytest.raises(RuntimeError, match=f'Triton kernel {name} has no gradient: set kernels to "torch"'):
            run(*operands)
        with torch.no_grad():
            run(*operands)
