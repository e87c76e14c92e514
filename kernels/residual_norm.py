"""Layer scale, residual and the next norm in one pass over the hidden states.

For every row, that is for every token of every tile,

    h = x + delta * scale
    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias      LayerNorm
    y = h / sqrt(mean(h ** 2) + eps) * weight                   RMSNorm, which has no bias

and without a residual, h = x. h is rounded to x's type before it is normalised, as it is where the two are separate
operations: y is the norm of the h that is returned. All else is float32.

A program takes one row, all of whose channels fit its registers, so that x and delta are read once and h and y written
once. What a row gives depends on that row alone, bit for bit. Variances come from squared distances to the mean rather
than from squares, so that a large mean costs no accuracy. x and delta bypass the L1 cache, which is left to the scale
and the norm's weights; h and y are what the next operations read, and are left in the L2 cache as far as it holds them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from lmdeploy_vico.kernels.implementation import TRITON, check, implementation, on_device, refuse_gradients

MOST_CHANNELS = 8192  # of a row: 32 values a thread
CHANNELS_OF_A_WARP, MOST_WARPS = 256, 8


class Normalised(NamedTuple):
    """Contiguous ``[B, T, D]`` of x's dtype each.

    Attributes:
        h: the sum; x itself where nothing is added.
        y: its norm.
    """

    h: torch.Tensor
    y: torch.Tensor


def residual_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> Normalised:
    """Add a branch's scaled output to the hidden states, and normalise the sum.

    Args:
        x: hidden states ``[B, T, D]``, any batch and token stride, float32, float16 or bfloat16; D at most 8192.
        delta: output of the branch, of x's shape and dtype, likewise.
        scale: layer scale ``[D]``, contiguous, any of these types.
        weight: of the norm, ``[D]``, likewise.
        bias: of a LayerNorm, ``[D]``, likewise; None for an RMSNorm.
        eps: of the norm.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or stride; the message begins with its name.
        RuntimeError: a gradient is needed, and the Triton kernel would run, which has none.
    """
    _check(x, weight, bias)
    check('delta', delta, tuple(x.shape), x.device)
    if delta.dtype != x.dtype:
        raise ValueError(f'delta: expected {x.dtype} like x, not {delta.dtype}')
    if delta.stride(-1) != 1:
        raise ValueError(f'delta: expected contiguous channels, not stride {delta.stride(-1)}')
    _check_channels('scale', scale, x)
    return _run(x, delta, scale, weight, bias, eps)


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalise rows that may lie apart, such as the q and k of a fused projection; no copy of them is made.

    Args:
        x: ``[B, T, D]``, as in :func:`residual_norm`.
        weight: of the norm, ``[D]``, contiguous.
        bias: of a LayerNorm, ``[D]``, contiguous; None for an RMSNorm.
        eps: of the norm.

    Returns:
        Contiguous ``[B, T, D]`` of x's dtype.

    Raises:
        ValueError, RuntimeError: as in :func:`residual_norm`.
    """
    _check(x, weight, bias)
    return _run(x, None, None, weight, bias, eps).y


def _run(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> Normalised:
    if implementation(x.device) != TRITON:
        return residual_norm_torch(x, delta, scale, weight, bias, eps)
    refuse_gradients('residual_norm', x, delta, scale, weight, bias)
    with on_device(x.device):
        return residual_norm_triton(x, delta, scale, weight, bias, eps)


def residual_norm_torch(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> Normalised:
    """The same in plain torch, with gradients; without delta there is no scale, and nothing is added."""
    h = x if delta is None or scale is None else (x.float() + delta.float() * scale.float()).to(x.dtype)
    if bias is None:
        y = F.rms_norm(h.float(), weight.shape, weight.float(), eps)
    else:
        y = F.layer_norm(h.float(), weight.shape, weight.float(), bias.float(), eps)
    return Normalised(h, y.to(x.dtype))


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check('x', x, (None, None, None))
    if x.stride(-1) != 1:
        raise ValueError(f'x: expected contiguous channels, not stride {x.stride(-1)}')
    if not 1 <= x.shape[-1] <= MOST_CHANNELS:
        raise ValueError(f'x: expected 1 to {MOST_CHANNELS} channels, not {x.shape[-1]}')
    _check_channels('weight', weight, x)
    if bias is not None:
        _check_channels('bias', bias, x)


def _check_channels(name: str, values: torch.Tensor, x: torch.Tensor) -> None:
    check(name, values, (x.shape[-1],), x.device)
    if not values.is_contiguous():
        raise ValueError(f'{name}: expected contiguous values, not stride {values.stride(0)}')


@triton.jit(do_not_specialize=['tokens'])
def residual_norm_kernel(
    x, delta, scale, weight, bias, h, y,
    tokens, stride_xb, stride_xt, stride_db, stride_dt, eps,
    D: tl.constexpr, BD: tl.constexpr, RESIDUAL: tl.constexpr, LAYER_NORM: tl.constexpr,
):  # fmt: skip
    """One row: token i_t of tile i_b, all channels."""
    i_t, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_row = (i_b * tokens + i_t) * D + o_d  # of the outputs
    b_h = tl.load(x + i_b * stride_xb + i_t * stride_xt + o_d, mask=m_d, other=0.0, cache_modifier='.cg')  # [BD]
    if RESIDUAL:
        p_delta = delta + i_b * stride_db + i_t * stride_dt + o_d
        b_delta = tl.load(p_delta, mask=m_d, other=0.0, cache_modifier='.cg').to(tl.float32)
        b_scale = tl.load(scale + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_h = (b_h.to(tl.float32) + b_delta * b_scale).to(h.dtype.element_ty)
        tl.store(h + p_row, b_h, mask=m_d)
    b_y = b_h.to(tl.float32)
    if LAYER_NORM:
        b_y = tl.where(m_d, b_y - tl.sum(b_y, 0) / D, 0.0)
    b_y *= 1.0 / tl.sqrt(tl.sum(b_y * b_y, 0) / D + eps)
    b_y *= tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    if LAYER_NORM:
        b_y += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(y + p_row, b_y.to(y.dtype.element_ty), mask=m_d)


def residual_norm_triton(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> Normalised:
    """The same by the kernel above."""
    tiles, tokens, width = x.shape
    residual = delta is not None
    y = x.new_empty(x.shape)
    h = x.new_empty(x.shape) if residual else x
    block = triton.next_power_of_2(width)
    delta = x if delta is None else delta
    residual_norm_kernel[(tokens, tiles)](
        x=x, delta=delta, scale=weight if scale is None else scale,
        weight=weight, bias=weight if bias is None else bias, h=h, y=y,
        tokens=tokens, stride_xb=x.stride(0), stride_xt=x.stride(1),
        stride_db=delta.stride(0), stride_dt=delta.stride(1), eps=eps,
        D=width, BD=block, RESIDUAL=residual, LAYER_NORM=bias is not None,
        num_warps=max(1, min(MOST_WARPS, block // CHANNELS_OF_A_WARP)),
    )  # fmt: skip
    return Normalised(h, y)
