"""A linear layer for few rows: float32 activations, weights of any type, float32 results.

    out[g, m, n] = act(sum_k a[g, m, k] * w[g, n, k] + bias[n]),    act = identity or GELU

The router's layers have one row per tile, so that what they cost is reading the weights, and precision is nearly free:
weights are multiplied in their own type, activations as two values of that type, high and low, and sums are float32.
With bfloat16 weights the result has 16 bits rather than 8, so that a decision that hangs on a near tie does not fall by
how activations were rounded.

Each warp of a program has its own slice of the K inputs, so that one program has many loads in flight; the slices'
products are summed at the end.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from lmdeploy_vico.kernels.implementation import (
    TRITON,
    check,
    device_limits,
    implementation,
    on_device,
    refuse_gradients,
)
from lmdeploy_vico.kernels.precision import dot_type, split_dot


def linear(a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False) -> torch.Tensor:
    """Apply a linear layer, or G of them, to float32 rows.

    Args:
        a: ``[M, K]`` or ``[G, M, K]``, float32, K contiguous.
        w: ``[N, K]`` or ``[G, N, K]``, K or N contiguous; float32, float16 or bfloat16. With float16, activations have
            to be within its range.
        bias: ``[N]`` contiguous, any of these types.
        gelu: whether to apply the exact (erf) GELU.

    Returns:
        float32 ``[M, N]``, or ``[G, M, N]`` whose ``transpose(0, 1)`` is contiguous.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or stride; the message begins with its name.
        RuntimeError: a gradient is needed, and the Triton kernel would run, which has none.
    """
    _check(a, w, bias)
    run = linear_torch
    if implementation(a.device) == TRITON:
        refuse_gradients('linear', a, w, bias)
        run = linear_triton
    with on_device(a.device):
        return run(a, w, bias, gelu) if a.dim() == 3 else run(a[None], w[None], bias, gelu)[0]


def linear_torch(a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """The same in plain torch, row by row, with gradients; weights that are not float32 are copied to float32.

    A product of several rows would do, but a CPU's libraries may sum a row differently depending on its place in them.
    """
    w = w.float()
    out = torch.stack([(w @ row[..., None])[..., 0] for row in a.unbind(1)]).transpose(0, 1)
    if bias is not None:
        out = out + bias.float()
    return F.gelu(out) if gelu else out


def _check(a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> None:
    if a.dim() not in (2, 3):
        raise ValueError(f'a: expected two or three dimensions, not {a.dim()}')
    groups = a.shape[:-2]
    check('a', a, (*groups, None, None))
    check('w', w, (*groups, None, a.shape[-1]), a.device)
    if a.dtype != torch.float32:
        raise ValueError(f'a: expected float32, not {a.dtype}')
    if 0 in a.shape or 0 in w.shape:
        raise ValueError(f'{"a" if 0 in a.shape else "w"}: nothing to multiply')
    if a.stride(-1) != 1:
        raise ValueError(f'a: expected contiguous inputs, not stride {a.stride(-1)}')
    if 1 not in (w.stride(-1), w.stride(-2)):
        raise ValueError(f'w: expected contiguous inputs or outputs, not strides {w.stride()}')
    if bias is not None:
        check('bias', bias, (w.shape[-2],), a.device)
        if not bias.is_contiguous():
            raise ValueError(f'bias: expected contiguous values, not stride {bias.stride(0)}')


@triton.jit(do_not_specialize=['rows'])
def linear_kernel(
    a, w, bias, out,
    rows, stride_ag, stride_am, stride_wg, stride_wn, stride_wk,
    G: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BIAS: tl.constexpr, GELU: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BM rows times BN outputs of one group: SLICES * BK inputs at a time, one slice a warp."""
    i_n, i_m, i_g = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    ROUND: tl.constexpr = w.dtype.element_ty
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    o_k = (tl.arange(0, SLICES) * BK)[:, None, None] + tl.arange(0, BK)[None, None, :]  # [SLICES, 1, BK]
    m_m, m_n = (o_m < rows)[None, :, None], (o_n < N)[None, :, None]
    p_a = a + i_g * stride_ag + o_m[None, :, None].to(tl.int64) * stride_am + o_k
    p_w = w + i_g * stride_wg + o_n[None, :, None].to(tl.int64) * stride_wn + o_k * stride_wk
    b_out = tl.zeros([SLICES, BM, BN], tl.float32)
    for start in tl.range(0, K, SLICES * BK, num_stages=STAGES):
        m_k = start + o_k < K
        b_a = tl.load(p_a + start, mask=m_m & m_k, other=0.0)  # [SLICES, BM, BK]
        b_w = tl.load(p_w + start * stride_wk, mask=m_n & m_k, other=0.0)  # [SLICES, BN, BK]
        b_wt = tl.permute(b_w.to(DOT), (0, 2, 1))
        b_out = split_dot(b_a, b_wt, b_out, ROUND, DOT)
    b_sum = tl.sum(b_out, 0)  # [BM, BN]
    if BIAS:
        b_sum += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        b_sum = 0.5 * b_sum * (1.0 + tl.erf(b_sum * 0.7071067811865476))
    p_out = out + o_m[:, None].to(tl.int64) * (G * N) + i_g * N + o_n[None, :]
    tl.store(p_out, b_sum, mask=(o_m < rows)[:, None] & (o_n < N)[None, :])


def linear_triton(a: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """The same by the kernel above."""
    (groups, rows, inputs), outputs = a.shape, w.shape[1]
    out = a.new_empty(rows, groups, outputs)
    blocks = settings(rows, inputs, w.stride(2) == 1, device_limits(a.device).shared_memory)
    linear_kernel[(triton.cdiv(outputs, blocks['BN']), triton.cdiv(rows, blocks['BM']), groups)](
        a=a, w=w, bias=w if bias is None else bias, out=out,
        rows=rows, stride_ag=a.stride(0), stride_am=a.stride(1),
        stride_wg=w.stride(0), stride_wn=w.stride(1), stride_wk=w.stride(2),
        G=groups, N=outputs, K=inputs, BIAS=bias is not None, GELU=gelu,
        DOT=dot_type(w.dtype), **blocks,
    )  # fmt: skip
    return out.transpose(0, 1)


def settings(rows: int, inputs: int, contiguous_inputs: bool, shared_memory: int) -> dict[str, int]:
    """Block sizes of :func:`linear_kernel`, given the bytes of shared memory of a program.

    Few outputs a program where the inputs are contiguous, so that there are programs enough; many where the outputs
    are, so that what is read lies together.
    """
    if not contiguous_inputs:
        return {'SLICES': 4, 'BM': 16, 'BN': 64, 'BK': 16, 'STAGES': 2, 'num_warps': 4}
    most_rows = 64 if shared_memory >= 150_000 else 32
    block_rows = min(most_rows, max(16, triton.next_power_of_2(rows)))
    block_inputs = 64 if block_rows == 16 else 32
    slices = 8 if inputs >= 512 else 4
    return {'SLICES': slices, 'BM': block_rows, 'BN': 16, 'BK': block_inputs, 'STAGES': 3, 'num_warps': slices}
