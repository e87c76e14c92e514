"""Attention pooling with absorbed projections: ``ctx_h = sum_t softmax_t(scale * x_t . u_h) x_t``.

One query per (tile, head) and keys = values = x, so that neither K nor V of the tile's T tokens is ever formed and what
is left is one pass over x ``[B, T, D]``.

Up to D = 1024 (256 in float32), with shared memory enough, a program holds all heads of a tile's share of the tokens:
each warp owns a slice of the D channels, for which it multiplies a block of tokens with u, and, once the slices'
products are summed to logits, weighs the same block, still in shared memory, into its slice of the context. x is read
once. With few tiles the tokens are split over programs and a second, small kernel merges the splits. Above, the context
(16 x 3200 float32) fits no program: logits first, then the weighted sum with the channels divided among programs; x is
read twice, the second time from the L2 cache as far as it fits there.

Sums are in float32. Operands of the matrix instructions have x's type, but what is not given in it, the queries and the
softmax's weights, goes in as two values of that type, high and low: with the digits of 16 bits where x is bfloat16.
"""

import torch
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

# By bytes of an element; with wider tokens the context of all channels would spill from the registers.
ONE_PASS_WIDTH = {2: 1024, 4: 256}
BLOCK_HEADS = 16  # rows of the smallest matrix instruction; the router's heads
SPLIT_COST = 3  # in blocks of tokens
WEIGHTED_SUMS_AT_ONCE = 3  # programs of weighted_sum_kernel that fit one multiprocessor
LOG2E = tl.constexpr(1.4426950408889634)


def attention_pool(x: torch.Tensor, u: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Pool the tokens of each tile once per head.

    Args:
        x: tokens ``[B, T, D]``, any batch and token stride, float32, float16 or bfloat16.
        u: absorbed queries ``[B or 1, H, D]``, any batch and head stride, of x's dtype or float32. With float16 x,
            ``scale * u`` has to be within its range.
        scale: of the logits.

    Returns:
        float32 ``[B, H, D]``.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or stride; the message begins with its name.
        RuntimeError: a gradient is needed, and the Triton kernel would run, which has none.
    """
    _check(x, u)
    if implementation(x.device) == TRITON:
        refuse_gradients('attention_pool', x, u)
        with on_device(x.device):
            return attention_pool_triton(x, u, scale)
    return attention_pool_torch(x, u, scale)


def attention_pool_torch(x: torch.Tensor, u: torch.Tensor, scale: float) -> torch.Tensor:
    """The same in plain torch, with gradients; takes B x T x D floats of scratch memory unless x is float32."""
    tokens = x.float()
    weights = torch.softmax(scale * (u.float() @ tokens.transpose(1, 2)), dim=-1)
    return weights @ tokens


def _check(x: torch.Tensor, u: torch.Tensor) -> None:
    check('x', x, (None, None, None))
    check('u', u, (None, None, x.shape[2]), x.device)
    if 0 in x.shape:
        raise ValueError(f'x: shape {list(x.shape)} holds nothing to pool')
    if u.shape[0] not in (1, x.shape[0]):
        raise ValueError(f'u: expected queries of 1 or {x.shape[0]} tiles, not {u.shape[0]}')
    if u.dtype not in (x.dtype, torch.float32):
        raise ValueError(f'u: expected {x.dtype} like x, or float32, not {u.dtype}')
    for name, tensor in (('x', x), ('u', u)):
        if tensor.stride(-1) != 1:
            raise ValueError(f'{name}: expected contiguous channels, not stride {tensor.stride(-1)}')


@triton.jit
def _weigh(b_logits, b_max, b_sum):
    """One step of the online softmax over a block of tokens; logits [BH, BT] are in units of log 2."""
    b_new = tl.maximum(b_max, tl.max(b_logits, 1))
    b_p = tl.exp2(b_logits - b_new[:, None])
    b_scale = tl.exp2(b_max - b_new)
    return b_p, b_scale, b_new, b_sum * b_scale + tl.sum(b_p, 1)


@triton.jit
def pool_kernel(
    x, u, ctx, stats,
    tokens, split_tokens, stride_xb, stride_xt, stride_ub, stride_uh, scale,
    D: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, SLICES: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    FINAL: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one tile, all channels: D <= SLICES * BD, one slice a warp."""
    i_b, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ROUND: tl.constexpr = x.dtype.element_ty
    o_h, o_t = tl.arange(0, BH), tl.arange(0, BT)
    o_d = (tl.arange(0, SLICES) * BD)[:, None, None] + tl.arange(0, BD)[None, None, :]  # [SLICES, 1, BD]
    m_d = o_d < D
    m_hd = (o_h < H)[None, :, None] & m_d
    b_u = tl.load(u + i_b * stride_ub + o_h[None, :, None] * stride_uh + o_d, mask=m_hd, other=0.0)  # [SLICES, BH, BD]
    b_u = b_u.to(tl.float32) * scale

    b_max = tl.full([BH], float('-inf'), tl.float32)
    b_sum = tl.zeros([BH], tl.float32)
    b_ctx = tl.zeros([SLICES, BH, BD], tl.float32)
    begin = i_s * split_tokens
    end = tl.minimum(begin + split_tokens, tokens)
    p_x = x + i_b * stride_xb + (begin + o_t)[None, :, None].to(tl.int64) * stride_xt + o_d
    for start in tl.range(begin, end, BT, num_stages=STAGES):
        m_t = start + o_t < end
        b_x = tl.load(p_x, mask=m_t[None, :, None] & m_d, other=0.0).to(DOT)  # [SLICES, BT, BD]
        b_xt = tl.permute(b_x, (0, 2, 1))
        b_products = split_dot(b_u, b_xt, tl.zeros([SLICES, BH, BT], tl.float32), ROUND, DOT)
        b_logits = tl.where(m_t[None, :], tl.sum(b_products, 0) * LOG2E, float('-inf'))
        b_p, b_scale, b_max, b_sum = _weigh(b_logits, b_max, b_sum)
        b_p = tl.broadcast_to(b_p[None], [SLICES, BH, BT])
        b_ctx = split_dot(b_p, b_x, b_ctx * b_scale[None, :, None], ROUND, DOT)
        p_x += BT * stride_xt

    i_out = i_b * tl.num_programs(1) + i_s
    if FINAL:
        b_ctx = b_ctx / b_sum[None, :, None]
    else:
        tl.store(stats + i_out * 2 * H + o_h, b_max, mask=o_h < H)
        tl.store(stats + i_out * 2 * H + H + o_h, b_sum, mask=o_h < H)
    tl.store(ctx + i_out * H * D + o_h[None, :, None] * D + o_d, b_ctx, mask=m_hd)


@triton.jit
def logits_kernel(
    x, u, logits,
    tokens, stride_xb, stride_xt, stride_ub, stride_uh, scale,
    D: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, SLICES: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits [H, BT] of a block of tokens, in units of log 2: SLICES * BD channels at a time, one slice a warp."""
    i_b, i_t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ROUND: tl.constexpr = x.dtype.element_ty
    o_h, o_t = tl.arange(0, BH), i_t * BT + tl.arange(0, BT)
    o_d = (tl.arange(0, SLICES) * BD)[:, None, None] + tl.arange(0, BD)[None, None, :]  # [SLICES, 1, BD]
    p_x = x + i_b * stride_xb + o_t[None, :, None].to(tl.int64) * stride_xt + o_d
    p_u = u + i_b * stride_ub + o_h[None, :, None] * stride_uh + o_d
    b_products = tl.zeros([SLICES, BH, BT], tl.float32)
    for start in tl.range(0, D, SLICES * BD, num_stages=STAGES):
        m_d = start + o_d < D
        b_x = tl.load(p_x + start, mask=(o_t < tokens)[None, :, None] & m_d, other=0.0)  # [SLICES, BT, BD]
        b_u = tl.load(p_u + start, mask=(o_h < H)[None, :, None] & m_d, other=0.0)  # [SLICES, BH, BD]
        b_xt = tl.permute(b_x.to(DOT), (0, 2, 1))
        b_products = split_dot(b_u.to(tl.float32) * scale, b_xt, b_products, ROUND, DOT)
    p_out = logits + (i_b * H + o_h[:, None]) * tokens + o_t[None, :]
    tl.store(p_out, tl.sum(b_products, 0) * LOG2E, mask=(o_h < H)[:, None] & (o_t < tokens)[None, :])


@triton.jit
def weighted_sum_kernel(
    x, logits, ctx, stats,
    tokens, split_tokens, stride_xb, stride_xt,
    D: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    FINAL: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one tile, BD channels, from logits [H, T]."""
    i_b, i_s, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    ROUND: tl.constexpr = x.dtype.element_ty
    o_h, o_t, o_d = tl.arange(0, BH), tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    m_h, m_d = o_h < H, o_d < D
    b_max = tl.full([BH], float('-inf'), tl.float32)
    b_sum = tl.zeros([BH], tl.float32)
    b_ctx = tl.zeros([BH, BD], tl.float32)
    begin = i_s * split_tokens
    end = tl.minimum(begin + split_tokens, tokens)
    p_x = x + i_b * stride_xb + (begin + o_t)[:, None].to(tl.int64) * stride_xt + o_d[None, :]
    p_logits = logits + (i_b * H + o_h[:, None]) * tokens + o_t[None, :]
    for start in tl.range(begin, end, BT, num_stages=STAGES):
        m_t = start + o_t < end
        b_x = tl.load(p_x, mask=m_t[:, None] & m_d[None, :], other=0.0)  # [BT, BD]
        b_logits = tl.load(p_logits + start, mask=m_h[:, None] & m_t[None, :], other=float('-inf'))  # [BH, BT]
        b_logits = tl.where(m_h[:, None], b_logits, 0.0)  # rows beyond H: anything finite
        b_p, b_scale, b_max, b_sum = _weigh(b_logits, b_max, b_sum)
        b_ctx = split_dot(b_p, b_x.to(DOT), b_ctx * b_scale[:, None], ROUND, DOT)
        p_x += BT * stride_xt

    i_out = i_b * tl.num_programs(1) + i_s
    if FINAL:
        b_ctx = b_ctx / b_sum[:, None]
    elif i_d == 0:
        tl.store(stats + i_out * 2 * H + o_h, b_max, mask=m_h)
        tl.store(stats + i_out * 2 * H + H + o_h, b_sum, mask=m_h)
    p_out = ctx + i_out * H * D + o_h[:, None] * D + o_d[None, :]
    tl.store(p_out, b_ctx, mask=m_h[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=['splits'])
def merge_kernel(
    partial, stats, ctx,
    splits,
    D: tl.constexpr, H: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BD channels of one head of one tile: its splits, weighed by exp(their maximum - the overall one)."""
    i_b, i_h, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_s, o_d = tl.arange(0, BS), i_d * BD + tl.arange(0, BD)
    m_s, m_d = o_s < splits, o_d < D
    p_stats = stats + (i_b * splits + o_s) * 2 * H + i_h
    p_partial = partial + ((i_b * splits + o_s[:, None]) * H + i_h) * D + o_d[None, :]
    b_max = tl.load(p_stats, mask=m_s, other=float('-inf'))
    b_sum = tl.load(p_stats + H, mask=m_s, other=0.0)
    b_partial = tl.load(p_partial, mask=m_s[:, None] & m_d[None, :], other=0.0)  # [BS, BD]
    b_scale = tl.exp2(b_max - tl.max(b_max, 0))
    b_ctx = tl.sum(b_partial * b_scale[:, None], 0) / tl.sum(b_sum * b_scale, 0)
    tl.store(ctx + (i_b * H + i_h) * D + o_d, b_ctx, mask=m_d)


def attention_pool_triton(x: torch.Tensor, u: torch.Tensor, scale: float) -> torch.Tensor:
    """The same by the kernels above."""
    settings = one_pass_settings(x.shape[2], x.dtype, device_limits(x.device).shared_memory)
    if settings is None:
        return _pool_in_two_passes(x, u, scale)
    return _pool_in_one_pass(x, u, scale, settings)


def one_pass_settings(width: int, dtype: torch.dtype, shared_memory: int) -> dict[str, int] | None:
    """Block sizes of :func:`pool_kernel`, given the bytes of shared memory of a program; None if it needs too much.

    Shared memory holds queries, blocks of tokens on their way, and what the warps exchange; registers the context.
    """
    padded = triton.next_power_of_2(max(width, 16))
    if padded > ONE_PASS_WIDTH[dtype.itemsize]:
        return None
    slices, tokens = min(8, padded // 16), 32
    queries, exchange = BLOCK_HEADS * padded * 4, slices * BLOCK_HEADS * tokens * 4
    for buffers in (2, 1):
        if queries + exchange + buffers * tokens * padded * dtype.itemsize <= shared_memory:
            return {'SLICES': slices, 'BD': padded // slices, 'BT': tokens, 'STAGES': buffers + 1, 'num_warps': slices}
    return None


def logits_settings(dtype: torch.dtype, few_programs: bool) -> dict[str, int]:
    """Block sizes of :func:`logits_kernel`; smaller blocks of tokens where large ones would leave the device idle."""
    if few_programs or dtype == torch.float32:
        return {'SLICES': 4, 'BD': 64, 'BT': 16, 'STAGES': 3 if dtype == torch.float32 else 4, 'num_warps': 4}
    return {'SLICES': 4, 'BD': 32, 'BT': 64, 'STAGES': 4, 'num_warps': 4}


def weighted_sum_settings(dtype: torch.dtype) -> dict[str, int]:
    """Block sizes of :func:`weighted_sum_kernel`."""
    if dtype == torch.float32:
        return {'BD': 128, 'BT': 32, 'STAGES': 3, 'num_warps': 4}
    return {'BD': 128, 'BT': 64, 'STAGES': 4, 'num_warps': 4}


def split_count(tiles: int, blocks: int, programs_per_tile: int, slots: int) -> int:
    """Into how many parts to split the blocks of tokens of each tile.

    As many as keep the device's ``slots`` (programs that run at once) busy, weighed against what a split costs: reading
    the queries and writing its context takes about as long as :data:`SPLIT_COST` blocks of tokens.
    """

    def duration(splits: int) -> tuple[int, int]:
        waves = triton.cdiv(tiles * programs_per_tile * splits, slots)
        return waves * (triton.cdiv(blocks, splits) + SPLIT_COST), splits

    splits = min(range(1, max(1, blocks // 2) + 1), key=duration)
    return triton.cdiv(blocks, triton.cdiv(blocks, splits))  # none of them empty


def _pool_in_one_pass(x: torch.Tensor, u: torch.Tensor, scale: float, settings: dict[str, int]) -> torch.Tensor:
    tiles, tokens, width = x.shape
    blocks = triton.cdiv(tokens, settings['BT'])
    splits = split_count(tiles, blocks, 1, device_limits(x.device).processors)
    ctx, partial, stats = _outputs(x, u, splits)
    pool_kernel[(tiles, splits)](
        x=x, u=u, ctx=partial, stats=stats,
        tokens=tokens, split_tokens=triton.cdiv(blocks, splits) * settings['BT'],
        stride_xb=x.stride(0), stride_xt=x.stride(1), stride_ub=_batch_stride(u), stride_uh=u.stride(1),
        scale=scale,
        D=width, H=u.shape[1], BH=_block_heads(u), FINAL=splits == 1, DOT=dot_type(x.dtype), **settings,
    )  # fmt: skip
    return _merge(ctx, partial, stats, splits)


def _pool_in_two_passes(x: torch.Tensor, u: torch.Tensor, scale: float) -> torch.Tensor:
    tiles, tokens, width = x.shape
    heads = u.shape[1]
    device = device_limits(x.device)
    logits = x.new_empty(tiles, heads, tokens, dtype=torch.float32)
    settings = logits_settings(x.dtype, few_programs=tiles * triton.cdiv(tokens, 64) < 2 * device.processors)
    logits_kernel[(tiles, triton.cdiv(tokens, settings['BT']))](
        x=x, u=u, logits=logits,
        tokens=tokens, scale=scale,
        stride_xb=x.stride(0), stride_xt=x.stride(1), stride_ub=_batch_stride(u), stride_uh=u.stride(1),
        D=width, H=heads, BH=_block_heads(u), DOT=dot_type(x.dtype), **settings,
    )  # fmt: skip
    settings = weighted_sum_settings(x.dtype)
    blocks, chunks = triton.cdiv(tokens, settings['BT']), triton.cdiv(width, settings['BD'])
    splits = split_count(tiles, blocks, chunks, WEIGHTED_SUMS_AT_ONCE * device.processors)
    ctx, partial, stats = _outputs(x, u, splits)
    weighted_sum_kernel[(tiles, splits, chunks)](
        x=x, logits=logits, ctx=partial, stats=stats,
        tokens=tokens, split_tokens=triton.cdiv(blocks, splits) * settings['BT'],
        stride_xb=x.stride(0), stride_xt=x.stride(1),
        D=width, H=heads, BH=_block_heads(u), FINAL=splits == 1, DOT=dot_type(x.dtype), **settings,
    )  # fmt: skip
    return _merge(ctx, partial, stats, splits)


def _block_heads(u: torch.Tensor) -> int:
    return max(BLOCK_HEADS, triton.next_power_of_2(u.shape[1]))


def _batch_stride(u: torch.Tensor) -> int:
    return 0 if u.shape[0] == 1 else u.stride(0)


def _outputs(x: torch.Tensor, u: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, where the splits go (the result itself if there is one), and their maxima and normalisers."""
    tiles, heads, width = x.shape[0], u.shape[1], x.shape[2]
    ctx = x.new_empty(tiles, heads, width, dtype=torch.float32)
    if splits == 1:
        return ctx, ctx, ctx
    partial = x.new_empty(tiles, splits, heads, width, dtype=torch.float32)
    return ctx, partial, x.new_empty(tiles, splits, 2, heads, dtype=torch.float32)


def _merge(ctx: torch.Tensor, partial: torch.Tensor, stats: torch.Tensor, splits: int) -> torch.Tensor:
    if splits == 1:
        return ctx
    tiles, heads, width = ctx.shape
    block = min(256, triton.next_power_of_2(width))
    merge_kernel[(tiles, heads, triton.cdiv(width, block))](
        partial=partial, stats=stats, ctx=ctx, splits=splits,
        D=width, H=heads, BS=triton.next_power_of_2(splits), BD=block, num_warps=4,
    )  # fmt: skip
    return ctx
