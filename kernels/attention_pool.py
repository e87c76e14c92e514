"""Attention pooling with absorbed projections: ``ctx_h = sum_t softmax_t(x_t . u_h) x_t``.

One query per (tile, head) and keys = values = x, so that neither K nor V of the tile's tokens is ever formed.
"""

import torch


def attention_pool(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Pool the tokens of each tile once per head.

    Args:
        x: tokens ``[B, T, D]``, any batch stride, float32, float16 or bfloat16.
        u: absorbed and scaled queries ``[B or 1, H, D]``.

    Returns:
        ``[B, H, D]`` float32, accumulated in float32.
    """
    if x.dim() != 3 or u.dim() != 3:
        raise ValueError(f'x and u must have three dimensions, not {x.dim()} and {u.dim()}')
    if u.shape[0] not in (1, x.shape[0]) or u.shape[2] != x.shape[2]:
        raise ValueError(f'u: shape {tuple(u.shape)} does not fit x of shape {tuple(x.shape)}')
    tokens = x.float()
    weights = torch.softmax(u.float() @ tokens.transpose(1, 2), dim=-1)
    return weights @ tokens
