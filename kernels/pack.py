"""Packing: rows of many tensors to their places in one, in one launch.

    out[start_i + offset[group_i] + j] = source_i[j],    0 <= j < length_i

This is how the projectors' outputs become the visual tokens of a prompt, and how visual tokens enter the embeddings of
a continuous batch, whatever mix of images, sequences and prefill chunks it holds. Against concatenation and a scatter
it saves a copy of all tokens and the making of an index tensor. The sources are found through a table of their
addresses, the one thing that the host sends.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lmdeploy_vico.kernels.implementation import TRITON, check, implementation, on_device, refuse_gradients

BLOCK_BYTES = 16 * 1024  # of a program
VECTOR_BYTES = 16  # of the widest load
LEAST_COLUMNS = 128


def pack(
    out: torch.Tensor,
    sources: Sequence[torch.Tensor],
    starts: Sequence[int],
    offsets: torch.Tensor | None = None,
    groups: Sequence[int] = (),
) -> torch.Tensor:
    """Copy the rows of each source to consecutive rows of ``out``, converting to its dtype.

    Args:
        out: ``[N, H]``, contiguous; rows that no source covers keep their values. float32, float16 or bfloat16.
        sources: ``[n_i, H]`` each, contiguous, on out's device, all of one dtype.
        starts: for each source the row of ``out`` where it begins.
        offsets: int ``[G]`` on out's device, what only the device knows: where each of G sequences begins in ``out``.
            Then ``starts`` count from there.
        groups: with offsets, for each source the index of its sequence.

    Returns:
        ``out``. Nothing keeps a source from reaching into the next sequence; of rows that two sources claim, either's
            values may stay. Rows outside ``out`` are dropped where ``offsets`` are given, since the host cannot know
            them.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or stride, or rows outside ``out``; the message begins
            with the argument's name.
        RuntimeError: a gradient is needed, and the Triton kernel would run, which has none.
    """
    _check(out, sources, starts, offsets, groups)
    if not any(len(source) for source in sources) or out.shape[1] == 0:
        return out
    if implementation(out.device) == TRITON:
        refuse_gradients('pack', out, *sources)
        with on_device(out.device):
            return pack_triton(out, sources, starts, offsets, groups)
    return pack_torch(out, sources, starts, offsets, groups)


def pack_torch(
    out: torch.Tensor,
    sources: Sequence[torch.Tensor],
    starts: Sequence[int],
    offsets: torch.Tensor | None = None,
    groups: Sequence[int] = (),
) -> torch.Tensor:
    """The same in plain torch, with gradients; with offsets on a GPU the host waits for them."""
    if offsets is not None:
        begins = offsets.tolist()
        starts = [start + begins[group] for start, group in zip(starts, groups, strict=True)]
    for source, start in zip(sources, starts, strict=True):
        first, last = max(start, 0), min(start + len(source), len(out))
        if first < last:
            out[first:last] = source[first - start : last - start]
    return out


def _check(
    out: torch.Tensor,
    sources: Sequence[torch.Tensor],
    starts: Sequence[int],
    offsets: torch.Tensor | None,
    groups: Sequence[int],
) -> None:
    check('out', out, (None, None))
    if not out.is_contiguous():
        raise ValueError(f'out: expected contiguous rows, not strides {out.stride()}')
    if len(starts) != len(sources):
        raise ValueError(f'starts: expected one for each of {len(sources)} sources, not {len(starts)}')
    for index, (source, start) in enumerate(zip(sources, starts, strict=True)):
        # Written out, since an engine has hundreds of sources in a step.
        if source.dim() != 2 or source.shape[1] != out.shape[1] or source.device != out.device:
            check(f'sources[{index}]', source, (None, out.shape[1]), out.device)
        if source.dtype != sources[0].dtype or not source.is_contiguous():
            raise ValueError(
                f'sources[{index}]: expected contiguous rows of {sources[0].dtype} like sources[0], '
                f'not {source.dtype} with strides {source.stride()}'
            )
        if offsets is None and not 0 <= start <= len(out) - len(source):
            raise ValueError(f'starts[{index}]: {len(source)} rows from {start} on do not lie in the {len(out)} of out')
    if sources:
        check('sources[0]', sources[0], (None, out.shape[1]), out.device)
    if offsets is None:
        if groups:
            raise ValueError(f'groups: expected none without offsets, not {groups}')
        return
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64) or offsets.device != out.device:
        given = f'{offsets.dtype} {list(offsets.shape)} on {offsets.device}'
        raise ValueError(f'offsets: expected int32 or int64 [G] on {out.device}, not {given}')
    if not offsets.is_contiguous():
        raise ValueError(f'offsets: expected contiguous values, not stride {offsets.stride(0)}')
    if len(groups) != len(sources) or not all(0 <= group < len(offsets) for group in groups):
        raise ValueError(
            f'groups: expected for each of {len(sources)} sources one of {len(offsets)} offsets, not {groups}'
        )


@triton.jit(do_not_specialize=['rows'])
def pack_kernel(
    table, offsets, out, like,
    rows,
    H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, ALIGNED: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """BR rows of one source. The table holds its address, start, length and group; ``like`` its type alone."""
    i_s, i_r, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p_row = table + i_s * 4
    address, start, length = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    if i_r * BR < length:
        if OFFSETS:
            start += tl.load(offsets + tl.load(p_row + 3)).to(tl.int64)
        source = address.to(tl.pointer_type(like.dtype.element_ty))
        if ALIGNED:
            source = tl.multiple_of(source, 16)
        o_r = (i_r * BR + tl.arange(0, BR)).to(tl.int64)
        o_h = i_h * BH + tl.arange(0, BH)
        m_r = (o_r < length) & (start + o_r >= 0) & (start + o_r < rows)
        mask = m_r[:, None] & (o_h < H)[None, :]
        b_rows = tl.load(source + o_r[:, None] * H + o_h[None, :], mask=mask, cache_modifier='.cg')
        tl.store(out + (start + o_r)[:, None] * H + o_h[None, :], b_rows.to(out.dtype.element_ty), mask=mask)


def pack_triton(
    out: torch.Tensor,
    sources: Sequence[torch.Tensor],
    starts: Sequence[int],
    offsets: torch.Tensor | None = None,
    groups: Sequence[int] = (),
) -> torch.Tensor:
    """The same by the kernel above."""
    rows = zip(sources, starts, groups or [0] * len(sources), strict=True)
    entries = [(source.data_ptr(), start, len(source), group) for source, start, group in rows]
    table = torch.tensor(entries, dtype=torch.int64, pin_memory=out.is_cuda).to(out.device, non_blocking=True)
    width, itemsize = out.shape[1], sources[0].element_size()
    blocks = settings(width, itemsize)
    longest = max(entry[2] for entry in entries)
    pack_kernel[(len(sources), triton.cdiv(longest, blocks['BR']), triton.cdiv(width, blocks['BH']))](
        table=table, offsets=table if offsets is None else offsets, out=out, like=sources[0], rows=len(out),
        H=width, OFFSETS=offsets is not None,
        ALIGNED=width * itemsize % VECTOR_BYTES == 0 and all(entry[0] % VECTOR_BYTES == 0 for entry in entries),
        **blocks,
    )  # fmt: skip
    return out


def settings(width: int, itemsize: int) -> dict[str, int]:
    """Block sizes of :func:`pack_kernel`: a part of a row that divides it evenly where one does, and then more rows."""
    values = BLOCK_BYTES // itemsize
    divisor = width & -width  # the largest power of two
    columns = min(divisor if divisor >= LEAST_COLUMNS else triton.next_power_of_2(width), values)
    return {'BR': values // columns, 'BH': columns, 'num_warps': 8}
