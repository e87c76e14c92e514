"""The vision side's forward pass in plain torch, as far as the calibration of a random checkpoint needs it.

It computes on a mapping of tensors by their checkpoint names, in the dtype of the pixels.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lmdeploy_vico.checkpoints.names import COMPRESSED_PROJECTOR, FULL_PROJECTOR, GATING, POOLING, VIT
from lmdeploy_vico.config import GRID, PATCH_SIZE, ROUTER_HEADS

Weights = Mapping[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Apply the linear layer ``name`` to the last dimension of ``x``."""
    bias = weights.get(f'{name}.bias')
    return F.linear(x, weights[f'{name}.weight'].to(x.dtype), None if bias is None else bias.to(x.dtype))


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """Apply LayerNorm, or RMSNorm where the checkpoint holds no bias for ``name``."""
    weight = weights[f'{name}.weight'].to(x.dtype)
    bias = weights.get(f'{name}.bias')
    if bias is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.layer_norm(x, (x.shape[-1],), weight, bias.to(x.dtype), eps)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention over ``[n, tokens, D]`` tensors without projections."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def patch_features(weights: Weights, pixels: Tensor) -> Tensor:
    """Convolve normalised pixels ``[n, 3, 14 h, 14 w]`` into patch embeddings ``[n, h w, D]`` without positions."""
    name = f'{VIT}embeddings.patch_embedding'
    weight, bias = (weights[f'{name}.{kind}'].to(pixels.dtype) for kind in ('weight', 'bias'))
    return F.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def vit(weights: Weights, pixels: Tensor, layers: int, heads: int) -> Tensor:
    """Return the patch tokens of normalised pixels: ``[n, 1024, D]`` for a tile, ``[n, 256, D]`` for its quarter."""
    x = patch_features(weights, pixels)
    embeddings = f'{VIT}embeddings'
    first = weights[f'{embeddings}.class_embedding'].to(x.dtype)
    position = weights[f'{embeddings}.position_embedding'].to(x.dtype)
    rows, columns = pixels.shape[-2] // PATCH_SIZE, pixels.shape[-1] // PATCH_SIZE
    grid = position[:, 1:].unflatten(1, (GRID, GRID))[:, :rows, :columns].flatten(1, 2)
    x = torch.cat([(first + position[:, :1]).expand(len(x), -1, -1), x + grid], dim=1)
    for i in range(layers):
        block = f'{VIT}encoder.layers.{i}'
        q, k, v = linear(weights, f'{block}.attn.qkv', norm(weights, f'{block}.norm1', x, 1e-6)).chunk(3, dim=-1)
        if f'{block}.attn.q_norm.weight' in weights:
            q = norm(weights, f'{block}.attn.q_norm', q, 1e-6)
            k = norm(weights, f'{block}.attn.k_norm', k, 1e-6)
        y = linear(weights, f'{block}.attn.proj', attend(q, k, v, heads))
        x = x + weights[f'{block}.ls1'].to(x.dtype) * y
        y = F.gelu(linear(weights, f'{block}.mlp.fc1', norm(weights, f'{block}.norm2', x, 1e-6)))
        x = x + weights[f'{block}.ls2'].to(x.dtype) * linear(weights, f'{block}.mlp.fc2', y)
    return x[:, 1:]


def gate_features(weights: Weights, tokens: Tensor) -> Tensor:
    """Return the input of the router's last linear layer, ``[n, D]``, for patch tokens ``[n, tokens, D]``."""
    x = weights[f'{POOLING}query_token'].to(tokens.dtype).expand(len(tokens), 1, -1)
    for step in (1, 2, 2, 2):
        name = f'{POOLING}attn{step}'
        weight = weights[f'{name}.in_proj_weight'].to(x.dtype).chunk(3)
        bias = weights[f'{name}.in_proj_bias'].to(x.dtype).chunk(3)
        q, k, v = (F.linear(y, weight[i], bias[i]) for i, y in enumerate((x, tokens, tokens)))
        x = norm(
            weights, f'{POOLING}norm{step}', linear(weights, f'{name}.out_proj', attend(q, k, v, ROUTER_HEADS)), 1e-5
        )
    x = x[:, 0]
    for i in range(1, 5):
        y = F.gelu(linear(weights, f'{GATING}block{i}.0', x))
        x = x + norm(weights, f'{GATING}block{i}.5', linear(weights, f'{GATING}block{i}.3', y), 1e-5)
    return norm(weights, f'{GATING}gate.0', x, 1e-5)


def project(weights: Weights, tokens: Tensor, ratio: int) -> Tensor:
    """Return visual tokens ``[n, tokens / ratio^2, H]``.

    A ratio of 2 takes the projector of full tiles, a ratio of 4 that of compressed tiles.
    """
    n, count, width = tokens.shape
    side = math.isqrt(count) // ratio
    x = tokens.view(n, side, ratio, side, ratio, width).transpose(2, 3).reshape(n, side * side, ratio * ratio * width)
    name, linears = (FULL_PROJECTOR, (1, 3)) if ratio == 2 else (COMPRESSED_PROJECTOR, (1, 4, 7))
    x = linear(weights, f'{name}{linears[0]}', norm(weights, f'{name}0', x, 1e-5))
    for i in linears[1:]:
        x = linear(weights, f'{name}{i}', F.gelu(x))
    return x
