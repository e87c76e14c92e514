"""Mixed-ratio pixel shuffle with LayerNorm: what feeds the two projectors, from one read of the patch tokens.

With x seen as a square of patches, merging by r is

    row[(i, j), (dy * r + dx) * D + c] = x[r * i + dy, r * j + dx, c],    0 <= i, j < side / r,   0 <= dy, dx < r

(ps_version "v2"), followed by LayerNorm over the r * r * D channels. A compressed tile is merged by 4 and goes to one
output, any other by 2 and goes to the other; each output holds its tiles' rows in the order of the tiles.

A program takes a square of 4 x 4 patches: one row of a compressed tile, or four of a full one. Where that many values
fit its registers it reads them once; otherwise it makes two passes, for the statistics and for the output, the second
of which finds the values in the L2 cache. x bypasses the L1 cache, which is left to the affine weights. Statistics are
in float32, from squared distances to the mean rather than from squares, so that a large mean costs no accuracy.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from lmdeploy_vico.kernels.implementation import TRITON, check, implementation, on_device, refuse_gradients

FULL_RATIO, COMPRESSED_RATIO = 2, 4
PATCHES = COMPRESSED_RATIO**2  # of a program
ONE_PASS_BYTES = 32 * 1024
TWO_PASS_CHANNELS = 512


class Norm(NamedTuple):
    """The affine part of a LayerNorm, weight and bias ``[r * r * D]``."""

    weight: torch.Tensor
    bias: torch.Tensor


class Shuffled(NamedTuple):
    """Normalised rows; of the tiles that an output has room for, in the order of the tiles.

    Attributes:
        full: ``[room * patches / 4, 4 * D]``; rows beyond those of the full tiles are zero in plain torch, where a
            gradient may pass through them, and are not written by the Triton kernel.
        compressed: ``[room * patches / 16, 16 * D]``, likewise.
        counts: int32 ``[2]`` on the device, how many tiles are full and how many compressed.
    """

    full: torch.Tensor
    compressed: torch.Tensor
    counts: torch.Tensor


def pixel_shuffle(
    x: torch.Tensor,
    compressed: torch.Tensor,
    full_norm: Norm,
    compressed_norm: Norm,
    eps: float,
    room: tuple[int, int] | None = None,
) -> Shuffled:
    """Merge and normalise each tile's patch tokens for the projector it is routed to.

    Args:
        x: patch tokens ``[B, side * side, D]``, any batch and token stride, float32, float16 or bfloat16.
        compressed: bool ``[B]`` on x's device; it is never brought to the host.
        full_norm: LayerNorm of the projector for full tiles, ``[4 * D]``.
        compressed_norm: LayerNorm of the projector for compressed tiles, ``[16 * D]``.
        eps: of both.
        room: for how many tiles the outputs have rows, (full, compressed), where the host knows; by default B each.
            Rows of tiles beyond it are dropped.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or stride; the message begins with its name.
        RuntimeError: a gradient is needed, and the Triton kernel would run, which has none.
    """
    _check(x, compressed, full_norm, compressed_norm, room)
    room = (len(x), len(x)) if room is None else room
    if implementation(x.device) == TRITON:
        refuse_gradients('pixel_shuffle', x, *full_norm, *compressed_norm)
        with on_device(x.device):
            return pixel_shuffle_triton(x, compressed, full_norm, compressed_norm, eps, room)
    return pixel_shuffle_torch(x, compressed, full_norm, compressed_norm, eps, room)


def pixel_shuffle_torch(
    x: torch.Tensor,
    compressed: torch.Tensor,
    full_norm: Norm,
    compressed_norm: Norm,
    eps: float,
    room: tuple[int, int],
) -> Shuffled:
    """The same in plain torch, with gradients; on a GPU the host waits for the number of tiles of each kind."""
    outputs = []
    branches = ((~compressed, FULL_RATIO, full_norm, room[0]), (compressed, COMPRESSED_RATIO, compressed_norm, room[1]))
    for chosen, ratio, norm, tiles in branches:
        merged = merge(x[chosen][:tiles], ratio)
        affine = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        rows = F.layer_norm(merged, merged.shape[-1:], *affine, eps)
        outputs.append(F.pad(rows, (0, 0, 0, 0, 0, tiles - len(rows))).flatten(0, 1))
    number = compressed.sum()
    return Shuffled(outputs[0], outputs[1], torch.stack([len(x) - number, number]).to(torch.int32))


def merge(x: torch.Tensor, ratio: int) -> torch.Tensor:
    """The merging alone: ``[B, side * side, D]`` to ``[B, (side / ratio) ** 2, ratio * ratio * D]``."""
    tiles, patches, width = x.shape
    merged = round(patches**0.5) // ratio
    squares = x.reshape(tiles, merged, ratio, merged, ratio, width).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(tiles, merged * merged, ratio * ratio * width)


def _check(
    x: torch.Tensor,
    compressed: torch.Tensor,
    full_norm: Norm,
    compressed_norm: Norm,
    room: tuple[int, int] | None,
) -> None:
    check('x', x, (None, None, None))
    tiles, patches, width = x.shape
    side = round(patches**0.5)
    if side * side != patches or side % COMPRESSED_RATIO or patches == 0:
        raise ValueError(f'x: {patches} patches do not form a square whose side divides by {COMPRESSED_RATIO}')
    if x.stride(-1) != 1:
        raise ValueError(f'x: expected contiguous channels, not stride {x.stride(-1)}')
    if compressed.dtype != torch.bool or compressed.shape != (tiles,) or compressed.device != x.device:
        given = f'{compressed.dtype} {list(compressed.shape)} on {compressed.device}'
        raise ValueError(f'compressed: expected bool [{tiles}] on {x.device}, not {given}')
    if not compressed.is_contiguous():
        raise ValueError(f'compressed: expected contiguous values, not stride {compressed.stride(0)}')
    norms = (('full_norm', full_norm, FULL_RATIO), ('compressed_norm', compressed_norm, COMPRESSED_RATIO))
    for name, norm, ratio in norms:
        for part, values in norm._asdict().items():
            check(f'{name}.{part}', values, (ratio**2 * width,), x.device)
            if not values.is_contiguous():
                raise ValueError(f'{name}.{part}: expected contiguous values')
    if room is not None and (len(room) != 2 or not all(0 <= tiles_ <= _MOST_TILES for tiles_ in room)):
        raise ValueError(f'room: expected two numbers of tiles, not {room}')


_MOST_TILES = 2**20


@triton.jit
def _position(compressed, i_b, tiles, BB: tl.constexpr):
    """Whether tile i_b is compressed, and how many tiles of its kind stand before it."""
    is_compressed = tl.load(compressed + i_b).to(tl.int32)
    b_same = tl.zeros([BB], tl.int32)
    for start in range(0, tiles, BB):
        o_b = start + tl.arange(0, BB)
        b_kind = tl.load(compressed + o_b, mask=o_b < tiles, other=0).to(tl.int32)
        b_same += ((b_kind == is_compressed) & (o_b < i_b)).to(tl.int32)
    return is_compressed, tl.sum(b_same, 0)


@triton.jit
def _statistics(p_x, o_p, eps, is_compressed, D: tl.constexpr, BD: tl.constexpr):
    """Mean and reciprocal deviation of the row that each of the 16 patches belongs to, and the last block read.

    Each patch's mean and sum of squared distances are merged over BD channels at a time (Chan's update), then over the
    patches of its row: all 16 of a compressed tile, a quarter of a full one.
    """
    b_mean = tl.zeros([16], tl.float32)
    b_square = tl.zeros([16], tl.float32)
    b_x = tl.zeros([16, BD], p_x.dtype.element_ty)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        m_d = o_d < D
        number = tl.minimum(D - start, BD).to(tl.float32)
        b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0, cache_modifier='.cg')  # [16, BD]
        b_new = tl.sum(b_x.to(tl.float32), 1) / number
        b_distance = tl.where(m_d[None, :], b_x.to(tl.float32) - b_new[:, None], 0.0)
        b_step = b_new - b_mean
        b_mean += b_step * (number / (start + number))
        b_square += tl.sum(b_distance * b_distance, 1) + b_step * b_step * (start * number / (start + number))
    # Patches of one row: in a full tile those of the same 2 x 2 quarter of the square.
    b_quarter = o_p // 8 * 2 + o_p % 4 // 2
    m_same = (b_quarter[:, None] == b_quarter[None, :]) | (is_compressed != 0)  # [16, 16]
    number = tl.where(is_compressed != 0, 16.0, 4.0)
    b_row_mean = tl.sum(tl.where(m_same, b_mean[None, :], 0.0), 1) / number
    b_step = b_mean[None, :] - b_row_mean[:, None]
    b_row_square = tl.sum(tl.where(m_same, b_square[None, :] + D * b_step * b_step, 0.0), 1)
    return b_row_mean, 1.0 / tl.sqrt(b_row_square / (number * D) + eps), b_x


@triton.jit
def _normalise(
    p_x, b_x, b_mean, b_rstd, weight, bias, p_out, o_channel, m_out,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Normalise and write 16 patches; b_x is what was read of them, all there is if BD >= D."""
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        mask = ((o_d < D) & m_out)[None, :]
        if BD < D:
            b_x = tl.load(p_x[:, None] + o_d[None, :], mask=mask, other=0.0, cache_modifier='.cg')
        b_weight = tl.load(weight + o_channel[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_bias = tl.load(bias + o_channel[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_out = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * b_weight + b_bias
        b_out = b_out.to(p_out.dtype.element_ty)
        tl.store(p_out[:, None] + o_d[None, :], b_out, mask=mask, cache_modifier='.cs')


@triton.jit(do_not_specialize=['tiles', 'full_room', 'compressed_room'])
def pixel_shuffle_kernel(
    x, compressed, full_weight, full_bias, compressed_weight, compressed_bias, full_out, compressed_out, counts,
    tiles, full_room, compressed_room, stride_xb, stride_xt, eps,
    SIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """One square of 4 x 4 patches of one tile, for all channels, BD at a time."""
    i_b, i_q = tl.program_id(0).to(tl.int64), tl.program_id(1)
    SQUARES: tl.constexpr = SIDE // 4
    i_y, i_x = i_q // SQUARES, i_q % SQUARES
    is_compressed, i_place = _position(compressed, i_b, tiles, BB)
    if (i_b == tiles - 1) & (i_q == 0):
        number = i_place + 1
        tl.store(counts + is_compressed, number)
        tl.store(counts + 1 - is_compressed, tiles - number)

    o_p = tl.arange(0, 16)
    o_y, o_x = o_p // 4, o_p % 4
    p_x = x + i_b * stride_xb + ((i_y * 4 + o_y) * SIDE + i_x * 4 + o_x).to(tl.int64) * stride_xt
    b_mean, b_rstd, b_x = _statistics(p_x, o_p, eps, is_compressed, D, BD)

    # Where each patch goes: row and first channel, of one output or the other.
    if is_compressed != 0:
        o_row = i_place.to(tl.int64) * (SQUARES * SQUARES) + i_q + o_p * 0
        p_out, m_out = compressed_out + o_row * (16 * D) + o_p * D, i_place < compressed_room
        _normalise(p_x, b_x, b_mean, b_rstd, compressed_weight, compressed_bias, p_out, o_p * D, m_out, D, BD)
    else:
        o_row = i_place.to(tl.int64) * (SQUARES * SQUARES * 4)
        o_row += (i_y * 2 + o_y // 2) * (SQUARES * 2) + i_x * 2 + o_x // 2
        o_channel = (o_y % 2 * 2 + o_x % 2) * D
        p_out, m_out = full_out + o_row * (4 * D) + o_channel, i_place < full_room
        _normalise(p_x, b_x, b_mean, b_rstd, full_weight, full_bias, p_out, o_channel, m_out, D, BD)


def pixel_shuffle_triton(
    x: torch.Tensor,
    compressed: torch.Tensor,
    full_norm: Norm,
    compressed_norm: Norm,
    eps: float,
    room: tuple[int, int],
) -> Shuffled:
    """The same by the kernel above."""
    tiles, patches, width = x.shape
    outputs = Shuffled(
        x.new_empty(room[0] * patches // FULL_RATIO**2, FULL_RATIO**2 * width),
        x.new_empty(room[1] * patches // COMPRESSED_RATIO**2, COMPRESSED_RATIO**2 * width),
        torch.zeros(2, dtype=torch.int32, device=x.device) if tiles == 0 else x.new_empty(2, dtype=torch.int32),
    )
    pixel_shuffle_kernel[(tiles, patches // PATCHES)](
        x=x, compressed=compressed, full_out=outputs.full, compressed_out=outputs.compressed, counts=outputs.counts,
        full_weight=full_norm.weight, full_bias=full_norm.bias,
        compressed_weight=compressed_norm.weight, compressed_bias=compressed_norm.bias,
        tiles=tiles, full_room=room[0], compressed_room=room[1],
        stride_xb=x.stride(0), stride_xt=x.stride(1), eps=eps,
        SIDE=round(patches**0.5), D=width, **settings(width, x.dtype),
    )  # fmt: skip
    return outputs


def settings(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes of :func:`pixel_shuffle_kernel`.

    In one pass, registers are bounded so that one program of a multiprocessor reads while another writes. In two, so
    many threads share a program that what the programs in flight will read again fits the L2 cache.
    """
    padded = triton.next_power_of_2(width)
    if PATCHES * padded * dtype.itemsize <= ONE_PASS_BYTES:
        return {'BD': padded, 'BB': 256, 'num_warps': 8, 'maxnreg': 128}
    return {'BD': TWO_PASS_CHANNELS, 'BB': 256, 'num_warps': 16}
