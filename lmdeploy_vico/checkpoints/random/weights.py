"""Random weights of a tiny checkpoint, under the published tensor names.

Plain noise of a small variance would give a model that ignores its input: attention would average everything away, and
answers would not depend on the picture. The spreads below keep attention selective (scores with a standard deviation of
about two) and every branch about as large as the residual stream to which it is added.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lmdeploy_vico.checkpoints.initialisation import Kind, Spread, fan_in, kind_of, seed_of
from lmdeploy_vico.checkpoints.names import GATING, LANGUAGE_MODEL, VIT, Shape
from lmdeploy_vico.config import PATCH_SIZE

Gains = Mapping[str, float]

# A matrix's standard deviation is its gain / sqrt(fan-in): by the end of its name, 1 for all others.
VISION_GAINS: Gains = {
    'attn.qkv.weight': 1.2,
    'attn.proj.weight': 1.2,
    'mlp.fc1.weight': 1.5,
    'mlp.fc2.weight': 1.5,
    'mlp1.1.weight': 1.5,
    'mlp2.1.weight': 1.5,
    'mlp2.4.weight': 1.5,
}
LANGUAGE_GAINS: Gains = {
    'o_proj.weight': 3.0,
    'gate_proj.weight': 1.5,
    'up_proj.weight': 1.5,
    'mlp.gate.weight': 5.0,  # of experts: the first of them outweighs the second
    'lm_head.weight': 3.0,
}
# The product of q_norm and k_norm gives attention scores a standard deviation of about the square of this. It is high
# enough that an answer depends on single tiles, and low enough that rounding to bfloat16 costs a few hundredths of the
# logits' deviation. A mixture of experts gets less: where rounding swaps two nearly tied experts, it does so for all
# equal tokens of a flat picture at once. For the same reason the experts of a layer are alike (a correlation).
QK_GAIN = {'dense': 1.5, 'moe': 1.4}
DOWN_GAIN = {'dense': 3.0, 'moe': 2.0}
EXPERT_LIKENESS = 0.95
POSITION = 0.3  # standard deviation of the position embedding
VECTOR = 0.1  # standard deviation of biases, norms and layer scales
LAYER_SCALE = 0.7
GATE_NORM = 0.3  # what the norms of the router's residual blocks are scaled by


class Noise:
    """Gaussian tensors that depend on a seed and on their own name only, not on the order they are asked for."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, name: str, shape: Shape, spread: Spread = Spread(1.0)) -> Tensor:  # noqa: B008 (frozen)
        """Return a float64 tensor of this shape."""
        generator = torch.Generator().manual_seed((seed_of(name) << 24) + self.seed)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values * spread.std + spread.mean


def spread(name: str, shape: Shape, gains: Gains) -> Spread:
    """Return the spread of a tensor's values before the special cases below."""
    match kind_of(name, shape):
        case Kind.MATRIX:
            gain = next((gain for ending, gain in gains.items() if name.endswith(ending)), 1.0)
            return Spread(gain / math.sqrt(fan_in(shape)))
        case Kind.EMBEDDING:
            return Spread(POSITION if name.endswith('position_embedding') else 1.0)
        case Kind.LAYER_SCALE:
            return Spread(VECTOR, LAYER_SCALE)
        case Kind.NORM:
            return Spread(VECTOR, 1.0)
        case Kind.BIAS:
            return Spread(VECTOR)


def patch_filters(noise: Noise, name: str, width: int) -> Tensor:
    """Return patch filters ``[D, 3, 14, 14]`` whose frequencies rise with the channel, from averages to fine detail.

    White noise would see little but a patch's mean colour, since photographs have most of their energy there.
    """
    i = torch.arange(PATCH_SIZE, dtype=torch.float64)
    cosines = torch.cos(math.pi / PATCH_SIZE * (i[None, :] + 0.5) * i[:, None])  # [frequency, position]
    frequency = (i[:, None] ** 2 + i[None, :] ** 2).sqrt()
    steepness = torch.linspace(-2.0, 3.0, width, dtype=torch.float64)[:, None, None, None]
    spectrum = noise(name, (width, 3, PATCH_SIZE, PATCH_SIZE)) * (frequency + 0.5) ** steepness
    filters = torch.einsum('dcuv,uy,vx->dcyx', spectrum, cosines, cosines)
    return filters / filters.flatten(1).norm(dim=1)[:, None, None, None]


def vision_weights(shapes: Mapping[str, Shape], noise: Noise) -> dict[str, Tensor]:
    """Return the tensors of the vision side in float64, before calibration.

    Args:
        shapes: of :func:`~lmdeploy_vico.checkpoints.shapes.checkpoint_shapes`; the language model's are left out.
        noise: of the checkpoint's seed.
    """
    patches = f'{VIT}embeddings.patch_embedding'
    out: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.startswith(LANGUAGE_MODEL):
            continue
        if name == f'{patches}.weight':
            out[name] = patch_filters(noise, name, shape[0])
        elif name == f'{patches}.bias':
            out[name] = torch.zeros(shape, dtype=torch.float64)
        else:
            out[name] = noise(name, shape, spread(name, shape, VISION_GAINS))
        if name.startswith(f'{GATING}block') and name.endswith('.5.weight'):
            out[name] *= GATE_NORM
    _measure_detail(out, f'{VIT}encoder.layers.0.mlp')
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


def language_weights(
    shapes: Mapping[str, Shape], llm_config: Mapping[str, Any], spoken: int, noise: Noise
) -> dict[str, Tensor]:
    """Return the tensors of the language model in float64.

    Only the first ``spoken`` tokens can be the most likely next one. The output rows of all others, special tokens
    among them, are zero, and so are their logits. The best of a thousand random logits is about three standard
    deviations above. So no answer ends before its token limit.

    Args:
        shapes: of :func:`~lmdeploy_vico.checkpoints.shapes.checkpoint_shapes`; the vision side's are left out.
        llm_config: the language model's section of ``config.json``.
        spoken: how many tokens of the vocabulary an answer can have.
        noise: of the checkpoint's seed.
    """
    llm = 'moe' if 'num_experts' in llm_config else 'dense'
    gains = {**LANGUAGE_GAINS, 'down_proj.weight': DOWN_GAIN[llm]}
    out: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if not name.startswith(LANGUAGE_MODEL):
            continue
        qk_norm = name.endswith(('q_norm.weight', 'k_norm.weight'))
        wanted = Spread(VECTOR, QK_GAIN[llm]) if qk_norm else spread(name, shape, gains)
        out[name] = noise(name, shape, wanted)
    if llm == 'moe':
        for layer in range(llm_config['num_hidden_layers']):
            experts = f'{LANGUAGE_MODEL}model.layers.{layer}.mlp.experts'
            _make_alike(out, noise, experts, llm_config['num_experts'])
    head = f'{LANGUAGE_MODEL}lm_head.weight'
    # Away from the token just read: its embedding is a large part of what arrives here, and answers got stuck on it.
    out[head] -= out[f'{LANGUAGE_MODEL}model.embed_tokens.weight'] / math.sqrt(llm_config['hidden_size'])
    out[head][spoken:] = 0
    return out


def _make_alike(out: dict[str, Tensor], noise: Noise, experts: str, count: int) -> None:
    """Give the experts of a layer a common part."""
    own = math.sqrt(1 - EXPERT_LIKENESS**2)
    for kind in ('gate_proj', 'up_proj', 'down_proj'):
        first = out[f'{experts}.0.{kind}.weight']
        common = noise(f'{experts}.{kind}', tuple(first.shape), Spread(float(first.std())))
        for expert in range(count):
            out[f'{experts}.{expert}.{kind}.weight'] *= own
            out[f'{experts}.{expert}.{kind}.weight'] += EXPERT_LIKENESS * common
