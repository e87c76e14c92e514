"""Random weights of a tiny checkpoint, under the published tensor names.

Plain small-variance noise would give a model that ignores its input: attention would average everything away and the
answers would not depend on the picture. The scales below keep attention selective (scores with a standard deviation of
about two) and every branch about as large as the residual stream it is added to.
"""

import math
import zlib

import torch
from torch import Tensor

from lmdeploy_vico.checkpoints.random.configuration import PATCH, Size

TOKENS = 1025
# q_norm x k_norm gives attention scores a standard deviation of about the square of this: high enough that an answer
# depends on single tiles, low enough that rounding to bfloat16 costs a few hundredths of the logits' deviation.
# A mixture of experts gets less: where rounding swaps two nearly tied experts, it does so for all the equal tokens of a
# flat picture at once. For the same reason the experts are alike (a correlation) and the first outweighs the second.
QK_GAIN = {'dense': 1.5, 'moe': 1.4}
MLP_GAIN = {'dense': 3.0, 'moe': 2.0}
EXPERT_LIKENESS = 0.95
EXPERT_GATE = 5.0


class Noise:
    """Gaussian tensors that depend on a seed and on their own name only, not on the order they are asked for."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        """Return a float64 tensor of this shape."""
        generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 24) + self.seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean


def _linear(out: dict[str, Tensor], noise: Noise, name: str, n_in: int, n_out: int, gain: float = 1.0) -> None:
    out[f'{name}.weight'] = noise(f'{name}.weight', n_out, n_in, std=gain / math.sqrt(n_in))
    out[f'{name}.bias'] = noise(f'{name}.bias', n_out, std=0.1)


def _norm(out: dict[str, Tensor], noise: Noise, name: str, width: int, bias: bool = True) -> None:
    out[f'{name}.weight'] = noise(f'{name}.weight', width, std=0.1, mean=1.0)
    if bias:
        out[f'{name}.bias'] = noise(f'{name}.bias', width, std=0.1)


def patch_filters(noise: Noise, name: str, width: int) -> Tensor:
    """Return patch filters ``[D, 3, 14, 14]`` whose frequencies rise with the channel, from averages to fine detail.

    White noise would see little but a patch's mean colour, since photographs have most of their energy there.
    """
    i = torch.arange(PATCH, dtype=torch.float64)
    cosines = torch.cos(math.pi / PATCH * (i[None, :] + 0.5) * i[:, None])  # [frequency, position]
    frequency = (i[:, None] ** 2 + i[None, :] ** 2).sqrt()
    steepness = torch.linspace(-2.0, 3.0, width, dtype=torch.float64)[:, None, None, None]
    spectrum = noise(name, width, 3, PATCH, PATCH) * (frequency + 0.5) ** steepness
    filters = torch.einsum('dcuv,uy,vx->dcyx', spectrum, cosines, cosines)
    return filters / filters.flatten(1).norm(dim=1)[:, None, None, None]


def vision_weights(size: Size, vit: str, noise: Noise) -> dict[str, Tensor]:
    """Return ``vision_model.*`` in float64."""
    out: dict[str, Tensor] = {}
    width, plain = size.vit_width, vit == 'layer_norm'
    name = 'vision_model.embeddings'
    out[f'{name}.class_embedding'] = noise(f'{name}.class_embedding', 1, 1, width)
    out[f'{name}.position_embedding'] = noise(f'{name}.position_embedding', 1, TOKENS, width, std=0.3)
    out[f'{name}.patch_embedding.weight'] = patch_filters(noise, f'{name}.patch_embedding.weight', width)
    out[f'{name}.patch_embedding.bias'] = torch.zeros(width, dtype=torch.float64)
    for i in range(size.vit_layers):
        block = f'vision_model.encoder.layers.{i}'
        for ls in ('ls1', 'ls2'):
            out[f'{block}.{ls}'] = noise(f'{block}.{ls}', width, std=0.1, mean=0.7)
        for norm in ('norm1', 'norm2'):
            _norm(out, noise, f'{block}.{norm}', width, bias=plain)
        _linear(out, noise, f'{block}.attn.qkv', width, 3 * width, gain=1.2)
        if not plain:
            del out[f'{block}.attn.qkv.bias']
            for norm in ('q_norm', 'k_norm'):
                _norm(out, noise, f'{block}.attn.{norm}', width, bias=False)
        _linear(out, noise, f'{block}.attn.proj', width, width, gain=1.2)
        _linear(out, noise, f'{block}.mlp.fc1', width, size.vit_mlp, gain=1.5)
        _linear(out, noise, f'{block}.mlp.fc2', size.vit_mlp, width, gain=1.5)
    _measure_detail(out, 'vision_model.encoder.layers.0.mlp')
    return out


def _measure_detail(out: dict[str, Tensor], mlp: str) -> None:
    """Let the first MLP add up the magnitudes of the higher frequencies into the last channels, for the router to read.

    Their mean over a tile says nothing (it is zero); gelu(x) + gelu(-x) is close to a multiple of abs(x).
    """
    width = out[f'{mlp}.fc2.weight'].shape[0]
    heard = torch.arange(int(0.45 * width), int(0.8 * width))
    unit = torch.arange(len(heard))
    for sign, units in ((1, unit), (-1, unit + len(heard))):
        out[f'{mlp}.fc1.weight'][units] = 0
        out[f'{mlp}.fc1.weight'][units, heard] = 4.0 * sign
        out[f'{mlp}.fc1.bias'][units] = 0
        out[f'{mlp}.fc2.weight'][:, units] = 0
        for k in range(1, 5):
            out[f'{mlp}.fc2.weight'][width - k, units] = 4.0 * (-1) ** k / len(heard)


def projector_weights(size: Size, flash: bool, noise: Noise) -> dict[str, Tensor]:
    """Return ``mlp1.*`` and, on a Flash checkpoint, ``mlp2.*`` in float64."""
    out: dict[str, Tensor] = {}
    width, hidden = size.vit_width, size.hidden
    _norm(out, noise, 'mlp1.0', 4 * width)
    _linear(out, noise, 'mlp1.1', 4 * width, hidden, gain=1.5)
    _linear(out, noise, 'mlp1.3', hidden, hidden)
    if flash:
        _norm(out, noise, 'mlp2.0', 16 * width)
        _linear(out, noise, 'mlp2.1', 16 * width, 2 * hidden, gain=1.5)
        _linear(out, noise, 'mlp2.4', 2 * hidden, 2 * hidden, gain=1.5)
        _linear(out, noise, 'mlp2.7', 2 * hidden, hidden)
    return out


def router_weights(size: Size, noise: Noise) -> dict[str, Tensor]:
    """Return ``pooling_before_gating.*`` and ``gating.*`` in float64, with the steps 3 and 4 that inference ignores."""
    out: dict[str, Tensor] = {}
    width = size.vit_width
    pooling = 'pooling_before_gating'
    out[f'{pooling}.query_token'] = noise(f'{pooling}.query_token', 1, width)
    for step in range(1, 5):
        name = f'{pooling}.attn{step}'
        out[f'{name}.in_proj_weight'] = noise(f'{name}.in_proj_weight', 3 * width, width, std=1 / math.sqrt(width))
        out[f'{name}.in_proj_bias'] = noise(f'{name}.in_proj_bias', 3 * width, std=0.1)
        _linear(out, noise, f'{name}.out_proj', width, width)
        _norm(out, noise, f'{pooling}.norm{step}', width)
    for i in range(1, 5):
        _linear(out, noise, f'gating.block{i}.0', width, 4 * width)
        _linear(out, noise, f'gating.block{i}.3', 4 * width, width)
        _norm(out, noise, f'gating.block{i}.5', width)
        out[f'gating.block{i}.5.weight'] *= 0.3
    _norm(out, noise, 'gating.gate.0', width)
    _linear(out, noise, 'gating.gate.1', width, 2)
    return out


def language_weights(size: Size, llm: str, vocab_size: int, spoken: int, noise: Noise) -> dict[str, Tensor]:
    """Return ``language_model.*`` in float64; only the first ``spoken`` tokens can be the most likely next one.

    The output rows of all others, special tokens among them, are zero: a logit of 0 where the best of a thousand
    random ones is about three standard deviations above. So no answer ends before its token limit.
    """
    out: dict[str, Tensor] = {}
    root, hidden = 'language_model.model', size.hidden
    out[f'{root}.embed_tokens.weight'] = noise(f'{root}.embed_tokens.weight', vocab_size, hidden)
    for i in range(size.layers):
        layer = f'{root}.layers.{i}'
        _attention(out, noise, layer, size, QK_GAIN[llm])
        if llm == 'moe':
            gate = f'{layer}.mlp.gate.weight'
            out[gate] = noise(gate, size.experts, hidden, std=EXPERT_GATE / math.sqrt(hidden))
            for expert in range(size.experts):
                _feed_forward(out, noise, f'{layer}.mlp.experts.{expert}', hidden, size.expert_mlp, MLP_GAIN[llm])
            _make_alike(out, noise, f'{layer}.mlp.experts', size.experts)
        else:
            _feed_forward(out, noise, f'{layer}.mlp', hidden, size.mlp, MLP_GAIN[llm])
        for norm in ('input_layernorm', 'post_attention_layernorm'):
            _norm(out, noise, f'{layer}.{norm}', hidden, bias=False)
    _norm(out, noise, f'{root}.norm', hidden, bias=False)
    head = 'language_model.lm_head.weight'
    out[head] = noise(head, vocab_size, hidden, std=3 / math.sqrt(hidden))
    # Away from the token just read: its embedding is a large part of what arrives here, and answers got stuck on it.
    out[head] -= out[f'{root}.embed_tokens.weight'] / math.sqrt(hidden)
    out[head][spoken:] = 0
    return out


def _attention(out: dict[str, Tensor], noise: Noise, layer: str, size: Size, qk_gain: float) -> None:
    width = size.heads * size.head_dim
    shapes = {
        'q_proj': (width, size.hidden),
        'k_proj': (size.kv_heads * size.head_dim, size.hidden),
        'v_proj': (size.kv_heads * size.head_dim, size.hidden),
        'o_proj': (size.hidden, width),
    }
    for kind, (n_out, n_in) in shapes.items():
        name = f'{layer}.self_attn.{kind}.weight'
        out[name] = noise(name, n_out, n_in, std=(3.0 if kind == 'o_proj' else 1.0) / math.sqrt(n_in))
    for kind in ('q_norm', 'k_norm'):
        name = f'{layer}.self_attn.{kind}.weight'
        out[name] = noise(name, size.head_dim, std=0.1, mean=qk_gain)


def _feed_forward(out: dict[str, Tensor], noise: Noise, name: str, hidden: int, width: int, gain: float) -> None:
    for kind, n_out, n_in in (('gate_proj', width, hidden), ('up_proj', width, hidden), ('down_proj', hidden, width)):
        weight = f'{name}.{kind}.weight'
        out[weight] = noise(weight, n_out, n_in, std=(gain if kind == 'down_proj' else 1.5) / math.sqrt(n_in))


def _make_alike(out: dict[str, Tensor], noise: Noise, name: str, experts: int) -> None:
    own = math.sqrt(1 - EXPERT_LIKENESS**2)
    for kind in ('gate_proj', 'up_proj', 'down_proj'):
        first = out[f'{name}.0.{kind}.weight']
        common = noise(f'{name}.{kind}', *first.shape, std=float(first.std()))
        for expert in range(experts):
            out[f'{name}.{expert}.{kind}.weight'] *= own
            out[f'{name}.{expert}.{kind}.weight'] += EXPERT_LIKENESS * common
