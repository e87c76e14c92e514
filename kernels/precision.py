"""Products on the matrix units that lose little where one side is given in a shorter type than the other."""

import torch
import triton
import triton.language as tl

from lmdeploy_vico.kernels.implementation import INTERPRETED

_TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type that a kernel casts operands of ``tl.dot`` to: their own, but float32 in the interpreter.

    The interpreter multiplies the 16-bit storage of bfloat16 as if it were integers (Triton 3.7). It also truncates
    where a GPU rounds to bfloat16, so that what it computes there is up to twice as far off.
    """
    return tl.float32 if INTERPRETED else _TRITON_TYPES[dtype]


@triton.jit
def split_dot(b_a, b_b, b_sum, ROUND: tl.constexpr, DOT: tl.constexpr):
    """``b_sum + b_a @ b_b`` for float32 b_a and b_b of type ROUND, cast to DOT already.

    b_a goes in as two values of that type, high and low, whose sum has about twice its digits.
    """
    b_high = b_a.to(ROUND)
    b_sum = tl.dot(b_high.to(DOT), b_b, b_sum, input_precision='tf32x3')
    if tl.float32 != ROUND:
        b_low = (b_a - b_high.to(tl.float32)).to(ROUND)
        b_sum = tl.dot(b_low.to(DOT), b_b, b_sum, input_precision='tf32x3')
    return b_sum
